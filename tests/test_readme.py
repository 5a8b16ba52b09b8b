import re
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent


def test_every_file_named_in_the_reading_order_exists() -> None:
    readme = (CHECKOUT / "README.md").read_text()
    section = readme.split("## Read in this order")[1].split("\n## ")[0]
    for line in section.strip().splitlines():
        folder = CHECKOUT
        for name in re.findall(r"`([\w/]+\.py)`", line):
            folder = (CHECKOUT / name).parent if "/" in name else folder
            assert (folder / Path(name).name).is_file(), f"README.md names {name}, which is not in {folder}"


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", (CHECKOUT / "README.md").read_text()))
    assert named and named <= targets
