"""Tests that take long, and which of their cases `make test` runs.

The other cases say the same of another objective, mesh, model or format. Of a test without a case
here `make test` runs nothing, and does not say what it states. `make test-all`, and pytest with the
name of a file, run all.
"""

# By test file and test: the ids of the cases that `make test` runs.
KEPT: dict[str, dict[str, set[str]]] = {
    # Every term is there once; the rest is how terms meet each other.
    "test_fused": {
        "test_agrees_with_the_definition": {
            *("TNFF", "TNRR", "TNRF", "TNRLL", "TNSR", "TNSF", "TNJJ", "TNJSJ", "NL+LL", "UL+LL"),
            *(
                "UL+KL",
                "NPO+KL",
                "UNDIAL+KL",
                "FTPO",
                "fine-tune",
                "TNFF residual x 3",
                "TNRF floor",
                "TNRR smoothed",
            ),
            *("TNRF everywhere",),
        },
        "test_agrees_with_the_definition_on_many_ids": {
            *("TNRF", "TNSF", "UL+KL", "FTPO", "TNSR everywhere, as negative"),
        },
        "test_agrees_with_the_definition_on_strengths": {
            *("TNRF-lowered", "TNRF-raised", "TNSR-lowered", "TNJSJ-raised", "UL+KL-raised"),
            *("UNDIAL-lowered", "TNRF everywhere-lowered"),
        },
        "test_agrees_with_the_definition_on_strengths_of_many_ids": {
            *("TNRF-60-lowered", "UL+KL-12-raised"),
        },
        "test_agrees_with_the_definition_on_capped_logits": {"TNRF-1", "TNRLL-0", "UL+LL-0"},
        "test_agrees_in_bfloat16": {"TNRF", "TNRLL"},
        # Compiled for the tests above, too.
        "test_finite_at_gaps_of_ten_thousand": {
            *("TNFF", "TNRR", "TNRF", "TNRLL", "TNSR", "TNJSJ", "NL+LL", "UL+KL", "NPO+KL"),
            *("UNDIAL+KL", "FTPO", "TNRF floor", "TNRR smoothed", "TNRF everywhere"),
        },
        "test_strengths_are_finite_at_gaps_of_ten_thousand": {
            *("TNRF", "TNSR", "TNJSJ", "UL+KL", "UNDIAL", "TNRF everywhere"),
        },
        "test_a_strength_of_1_is_removal_bit_by_bit": {"TNRF everywhere", "TNRLL", "UL+KL"},
        "test_a_set_is_the_ids_that_it_stands_for": {
            *("TNRF-removed", "TNRR smoothed-removed", "TNRF everywhere-graded", "UL+KL-graded"),
        },
        "test_eight_devices_give_the_numbers_of_one": {
            *("TNRF-(1, 4, 2)", "TNRLL smoothed-(8, 1, 1)", "TNRF everywhere-(2, 2, 2)"),
            *("TNRF capped-(4, 1, 2)", "NPO+KL-(2, 2, 2)", "FTPO-(1, 1, 8)"),
        },
        "test_eight_devices_give_the_numbers_of_one_on_strengths": {"TNRF"},
        "test_the_loop_exchanges_rows_alone_and_divides_the_work": {"(4, 1, 2)"},
    },
    "test_step_on_meshes": {
        "test_eight_devices_give_the_numbers_of_one": {"shape3"},
    },
    "test_causal_lm": {
        "test_eight_devices_and_microbatches_give_the_update_of_one": {
            "{'data': 2, 'fsdp': 2, 'model': 2}-2",
        },
        "test_upper_layers_learn_what_they_learn_where_all_do": set(),
        "test_lower_layers_are_computed_once_and_have_no_gradient": set(),
        "test_what_rows_begin_with_is_learned_from_once_for_all": {"all axes"},
        "test_what_rows_begin_with_is_computed_once_in_a_loop_of_layers": set(),
        "test_devices_that_share_a_batch_each_read_what_its_prompts_begin_with": set(),
    },
    "test_scan_layers": {
        "test_what_is_computed_again_has_the_same_dropout": {"True"},
        "test_values_and_gradients_are_those_of_layers_apart": {"1.1 packed", "umt5"},
        "test_full_keeps_less_than_minimal_and_minimal_less_than_none": set(),
        "test_eight_devices_with_stacked_layers_give_the_update_of_one_without": set(),
    },
    "test_attention": {
        "test_splash_gives_the_update_of_xla": {"{'data': 2, 'fsdp': 2, 'model': 2}-2"},
        "test_splash_is_compiled_for_a_tpu_that_is_not_here": set(),
    },
    "test_trained_layers": {
        "test_packed_rows_devices_and_microbatches": {"adapters_cached-t5"},
        "test_the_gradient_is_that_part_of_the_whole_models": {"mixed"},
        "test_neither_model_is_computed_below": set(),
        "test_two_models_are_compared_by_what_differs": {"mixed-(1,)", "t5-(1,)"},
        "test_models_that_differ_below_are_compared_whole": {"embedding", "encoder", "norm"},
        "test_states_of_rows_that_begin_alike": {"adapters_cached-1"},
        "test_a_step_with_cached_states_is_compiled_for_devices": set(),
        "test_a_step_is_compiled_for_rows_that_begin_alike": set(),
        "test_frozen_layers_are_where_the_step_does_not_look": set(),
        "test_adapters_learn_the_same_from_cached_states": {"mixed, everywhere"},
    },
    "test_load_original": {
        "test_the_original_is_a_fixed_point_in_bfloat16": set(),
        "test_adapters_of_stacked_layers_go_on_from_layers_apart": set(),
        "test_a_run_of_upper_layers_is_read_as_the_model_that_it_is": set(),
        "test_states_with_evaluation": set(),
        "test_cached_states_give_the_run_of_a_second_forward": {"{'NUM_MICROBATCHES': 2}"},
        "test_states_of_another_network_are_computed_again": set(),
    },
    "test_packing": {
        "test_loss_and_gradient_are_those_of_rows_of_their_own": {"factored, strengths"},
    },
    "test_removed_everywhere": {
        "test_another_program_that_writes_the_records_takes_them_away": {"annotate"},
    },
    "test_look_ahead": {
        "test_exact_values_lead_to_the_nearest_texts_and_marks_alone_do_not": {"two"},
    },
    "test_generate": {
        "test_eight_devices_give_the_tokens_of_one": {"masked_beams"},
    },
    "test_formats": {
        "test_a_pipeline_hands_the_model_back_as_it_came": {"huggingface-False"},
    },
    "test_gguf": {
        "test_a_run_is_whole_without_the_file_that_it_came_from": set(),
    },
    "test_damaged_causal_lm": {
        "test_every_tensor": {"llama_3_4"},
        "test_every_setting": {"llama_3_4", "smollm3", "gemma3_4"},
        "test_every_setting_of_a_tokenizer": {"qwen"},
    },
    "test_damaged_models": {
        "test_every_setting_of_the_network": {"huggingface"},
        "test_arrays_of_orbax": {"orbax"},
    },
    "test_fuzz": {
        "test_model_directories": {"huggingface", "t5x_orbax"},
    },
    # What a command that was stopped, killed or refused does when it is given again.
    "test_processes": {
        "test_a_run_that_is_stopped_and_then_loses_a_process_ends_as_the_undisturbed_one": set(),
        "test_hosts_have_what_they_start_from_at_paths_of_their_own": set(),
        "test_four_processes_with_sharded_parameters_begin_as_one_does": set(),
        "test_processes_that_have_other_models_do_not_train_on_a_mixture": {"digest", "sharded"},
        "test_processes_that_start_from_other_models_do_not_train_on_a_mixture": set(),
    },
    "test_patch": {
        "test_a_sigterm_in_a_leg_and_the_same_command": set(),
        "test_a_round_that_there_was_no_time_for_is_begun_by_a_later_command": set(),
        "test_a_finished_patch_makes_room_for_one_with_another_wish": set(),
        "test_so_does_that_of_a_later_round": set(),
        "test_looks_of_a_command_that_was_stopped_count_where_the_time_is_short": set(),
        "test_a_full_disk_ends_with_that_and_the_same_command_goes_on": set(),
    },
    "test_sweep": {
        "test_a_learning_rate_is_chosen_as_a_weight_is": set(),
        "test_an_arm_learns_from_what_looks_ahead": set(),
        "test_the_frontier_waits_for_the_arms_of_other_processes": set(),
        "test_what_an_annotator_removes_everywhere_is_removed_in_its_arms": set(),
    },
    "test_output_parts": {
        "test_annotate_that_was_killed_goes_on": {"1-done0"},
    },
    "test_two_at_once": {
        "test_of_two_that_train_in_one_folder_one_does": set(),
    },
    "test_buckets": {
        "test_two_do_not_write_one_output_there_and_a_killed_one_goes_on": set(),
    },
    # A whole program, of a kind that another test runs as well.
    "test_chat_main_job": {
        "test_two_processes_learn_what_one_learns": set(),
        "test_a_stopped_run_goes_on_to_the_same_numbers": set(),
        "test_tokens_to_blame_are_found": set(),
        "test_a_patch_takes_the_unwanted_words_and_leaves_the_rest": set(),
    },
    "test_localize": {
        "test_patch_learns_from_labels_of_whole_outputs": set(),
        "test_the_same_again_is_the_same_bytes": set(),
        "test_marks_that_are_given_stay": set(),
    },
    "test_tutorial": {"test_the_notebook_works_as_it_stands": set()},
    "test_paper_experiments": {
        "test_experiment_runs_end_to_end": {
            "civil_comments_t5_base-civil_comments_replies-Lexicon"
        },
    },
    "test_tpu_program": {
        "test_what_does_not_fit_is_said_with_what_would_help": set(),
        "test_what_the_compiler_accepts_fits": set(),
    },
    "test_tpu_vm": {
        "test_trouble_while_it_is_created_again": {"trouble0"},
        "test_requests_that_fail_now_and_then_in_a_long_life": set(),
    },
    "test_mistakes": {
        "test_a_long_list_that_no_device_has_room_for": set(),
    },
    "test_benchmarks": {
        "test_a_variant_of_the_step_is_measured": set(),
        "test_what_is_a_failure_of_reading_a_damaged_file": {"refuse-None"},
    },
    # The model of the demonstration, which `make demo` runs.
    "test_smollm2": {"test_it_answers": set()},
}


def is_left_out(file: str, test: str, case: str) -> bool:
    """Whether `make test` leaves a case of a test to `make test-all`."""
    kept = KEPT.get(file, {}).get(test)
    return kept is not None and case not in kept
