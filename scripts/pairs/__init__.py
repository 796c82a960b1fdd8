"""Preference pairs, from a file to what is trained on.

Reading: `sources` (rows from files and the hub), `formats` (rows as pairs), `tokens` (pairs as the
trainer tokenises them), `checks` and `report` (what is wrong with them), `load` (all of these).
Building from a model's own answers: `build`, `judges`, and `provenance` (what came from what).
"""
