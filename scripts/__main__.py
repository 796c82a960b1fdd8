"""`python -m scripts` lists the commands."""

from scripts.cli import COMMANDS, command


def main() -> None:
    for name, purpose in COMMANDS.items():
        print(f"python -m scripts.{name:<12} {purpose}")


if __name__ == "__main__":
    command(main)
