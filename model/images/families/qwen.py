from __future__ import annotations

from llamaclust.model.images.families.family import Filter, ImageFamily, between, free, whole
from llamaclust.model.images.families.rounding import smart_resized

QWEN = ImageFamily(free, whole(smart_resized, Filter.BICUBIC), between("<|vision_start|>", "<|vision_end|>"))
