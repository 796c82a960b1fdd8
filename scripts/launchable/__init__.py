"""The Brev launchable of `brev-launchable.yaml`: check it, render it, create and update it."""
