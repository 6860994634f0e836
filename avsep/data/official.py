"""How many videos the published data sets have, as far as that is known; what ``avsep data check`` compares with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from avsep.data.phrases import CLASSES

__all__ = ["OFFICIAL", "OfficialCounts"]


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
_MUSIC21_TRAIN = (47, 39, 32, 28, 44, 33, 54, 14, 41, 63, 32, 76, 41, 46, 49, 41, 45, 39, 29, 47)
_MUSIC21 = {name: {"train": train, "val": 5, "test": 5} for name, train in zip(CLASSES, _MUSIC21_TRAIN, strict=True)}

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
