"""``python -m adadim_lightning`` prints versions, for bug reports."""

from adadim_lightning.cli.versions import versions

if __name__ == "__main__":
    for name, version in versions().items():
        print(f"{name:18} {version}")
