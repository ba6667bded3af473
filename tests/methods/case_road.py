from __future__ import annotations

from tests.methods.case import Case

_LLAMA = {"group_size": 8, "target_modules": ["q_proj", "down_proj"]}
CASES = [
    Case("road_1", "llama", "RoadConfig", _LLAMA),
    Case("road_2", "bert", "RoadConfig", {"variant": "road_2", "group_size": 16, "target_modules": ["query", "value"]}),
    Case("road_4", "llama", "RoadConfig", {"variant": "road_4", **_LLAMA}),
]
