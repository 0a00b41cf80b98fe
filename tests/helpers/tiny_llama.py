"""The smallest Llama, for tests of decoder-only networks to change."""

from tnt_jax.models.causal_lm_config import CausalLMConfig

LLAMA = CausalLMConfig(
    vocab_size=40,
    emb_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    mlp_activations=("silu", "linear"),
    logits_via_embedding=True,
    num_layers=2,
)
