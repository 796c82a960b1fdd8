"""Preference pairs, from a file to what is trained on.

Reading: `files` and `download` (rows of a file, and of one behind an address), `sources` (what a
config names, by split), `formats` (rows as pairs), `unpaired` (pairs of single answers), `tokens`
(pairs as the trainer tokenises them), `checks` and `report` (what is wrong with them), `load` (all
of these). Building from a model's own answers: `build`, `judges`, `workers` (several asked at a
time), and `provenance` (what came from what).
"""
