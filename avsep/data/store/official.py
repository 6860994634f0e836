"""How many videos the published data sets have, as far as that is known; what ``avsep data check`` compares with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["MUSIC21_CLASSES", "OFFICIAL", "OfficialCounts"]


@dataclass(frozen=True)
class OfficialCounts:
    """``splits`` by split, of all classes together; ``classes`` by class and split where that is known; ``lists`` names
    what was counted, ``source`` who published it."""

    lists: str
    source: str
    splits: Mapping[str, int]
    classes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.splits.values())


# train videos of each class in the order of the paper's tasks
_MUSIC21_TRAIN = {
    "accordion": 47,
    "bagpipe": 39,
    "bassoon": 32,
    "clarinet": 28,
    "drum": 44,
    "flute": 33,
    "piano": 54,
    "saxophone": 14,
    "tuba": 41,
    "violin": 63,
    "xylophone": 32,
    "acoustic_guitar": 76,
    "banjo": 41,
    "cello": 46,
    "electric_bass": 49,
    "erhu": 41,
    "guzheng": 45,
    "pipa": 39,
    "trumpet": 29,
    "ukulele": 47,
}
MUSIC21_CLASSES = tuple(_MUSIC21_TRAIN)
_MUSIC21 = {name: {"train": train, "val": 5, "test": 5} for name, train in _MUSIC21_TRAIN.items()}

OFFICIAL: dict[str, OfficialCounts] = {
    "music21": OfficialCounts(
        lists="ContAV-Sep's lists of MUSIC-21 without congas",
        source="{train,val,test}_category_vids_dict.npy of the code of Pian et al., NeurIPS 2024 (commit 199acff)",
        splits={"train": 840, "val": 100, "test": 100},
        classes=_MUSIC21,
    ),
    "ave": OfficialCounts(
        lists="AV-CIL's lists of AVE, 28 classes",
        source="all_classId_vid_dict.npy of the code of Pian et al., ICCV 2023",
        splits={"train": 3294, "val": 391, "test": 394},
    ),
    "vggsound": OfficialCounts(
        lists="AV-CIL's lists of VGGSound, 100 classes",
        source="all_classId_vid_dict.npy of the code of Pian et al., ICCV 2023",
        splits={"train": 51195, "val": 5000, "test": 5000},
    ),
}
