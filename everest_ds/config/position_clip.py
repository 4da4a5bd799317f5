"""The shape of the clips with which an encoder learned its positions."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class PositionClip(BaseModel):
    """The clip shape from whose position table that of another clip shape is interpolated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_frames: Annotated[int, Field(ge=1)]
    image_size: Annotated[int, Field(ge=1)]

    def __str__(self) -> str:
        return f"{self.num_frames} frames of {self.image_size}x{self.image_size}"
