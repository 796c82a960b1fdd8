"""Preference pairs, from a file to what is trained on.

Reading: `files` (rows of one file), `sources` (what a run names, by split), `formats` and
`messages` (rows as pairs), `tokens` (pairs as the trainer tokenises them), `checks` and `report`
(what is wrong with them), `load` (all of these). Building from a model's own answers: `build`,
`judges`, `checker`, `sampling`, and `provenance` (what came from what).
"""
