"""Fields of `[run]` that jobs of every objective have."""

from typing import Annotated

from pydantic import Field

# It becomes a folder's name: no separators, no leading dot.
RunName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name of the run and its folder."),
]
KeptCheckpoints = Annotated[int, Field(ge=1, description="Newest checkpoints that are kept.")]
