"""What a machine with a GPU can measure of this project's claims: `python -m tests.gpu`."""
