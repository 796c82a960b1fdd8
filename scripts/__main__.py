"""`python -m scripts` lists the commands."""

from scripts.cli import COMMANDS

if __name__ == "__main__":
    for name, purpose in COMMANDS.items():
        print(f"python -m scripts.{name:<12} {purpose}")
