"""The records of the comparison of docs/protocol.md, and what they decide."""

from pathlib import Path

import protocol

RECORDS = Path(__file__).parents[1] / "docs" / "records"
# Trials whose records are there, and those of them that diverged, as the page's commands name them.
DIVERGED = {
    "glyphs": [
        "sd_lora-1.0/seed11",
        "sd_lora-0.5/seed12",
        "seq_lora-1.0/seed12",
        "sd_lora-1.0/seed12",
    ],
    "caltech101-dinov2": ["sd_lora-0.18/seed12"],
}
TRIED = [*DIVERGED]


def recorded(stream: str, readout: str = protocol.READOUT) -> protocol.Trials | None:
    """The trials of a stream, if they have been made."""
    path = RECORDS / f"{stream}-choose.jsonl"
    if stream not in TRIED:
        assert not path.exists()
        return None
    return protocol.read_trials([path], stream, readout, DIVERGED[stream])
