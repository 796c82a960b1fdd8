"""Checkpoints that are whole or not there (`store`), of this run or refused (`identity`), in a
folder that one run uses at a time (`lock`), from which a failed run goes on (`trouble`)."""
