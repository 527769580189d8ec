"""The report's colours: one accent an alignment, and what each colour of the light theme is in the dark one."""

from collections.abc import Sequence

INK, MUTED, RULE, PAPER = "#1b2330", "#667085", "#e3e6eb", "#ffffff"
GENERAL = "#98a1b0"
ACCENTS = {"helpful": "#2f6fd6", "harmless": "#d4622a", "honest": "#1a9a72"}
PALETTE = ("#8f5bd0", "#bd8f12", "#c9437c", "#2a9bb8", "#6b8e23", "#7a5c4a")  # for further alignments
DARK = {
    INK: "#e8ebf0",
    MUTED: "#98a2b3",
    RULE: "#2c333f",
    PAPER: "#171b22",
    GENERAL: "#7d8797",
    ACCENTS["helpful"]: "#6aa1f5",
    ACCENTS["harmless"]: "#f08a55",
    ACCENTS["honest"]: "#43c79b",
    **dict(zip(PALETTE, ("#b58cf0", "#e0b840", "#ee77a8", "#5cc6e0", "#a5c956", "#b89580"), strict=True)),
}


def colour_of(alignment: str | None, alignments: Sequence[str]) -> str:
    """The accent colour of an alignment; grey for a general expert."""
    if alignment is None:
        return GENERAL
    others = [a for a in alignments if a not in ACCENTS]
    return ACCENTS.get(alignment) or PALETTE[others.index(alignment) % len(PALETTE) if alignment in others else 0]


def css_name(colour: str) -> str:
    """The CSS variable of a colour of the light theme."""
    return f"--c{colour.removeprefix('#')}"
