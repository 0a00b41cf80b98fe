"""Tokenisers: text to ids and back, with the characters of each id; chat templates; conversations.

Imports `runtime`.
"""
