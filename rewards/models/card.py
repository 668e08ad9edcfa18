"""What a reward model says of itself: `reward.json`, and the labels that it has seen.

    folder/reward.json        the card: kind, rule, normalisation, text format, version, accuracy found
    folder/label_keys.txt     SHA-256 of every training prompt, sorted, one a line
    folder/…                  weights and tokenizer, which the version is the SHA-256 of

A reader checks the version, so a folder whose weights were changed afterwards is refused. Files that nothing
reads when it scores, such as a README.md, are no part of it.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from rewards.models.settings import Kind, Loss, Rule, TextSettings
from rewards.settings import Settings

CARD, LABEL_KEYS, EVALUATION = "reward.json", "label_keys.txt", "evaluation.json"
_OUTSIDE_VERSION = frozenset({CARD, EVALUATION})
# What transformers may read: weights, tokenizers, and every JSON, as an adapter's configuration counts too.
_IN_VERSION = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken"),
    *("tokenizer*", "vocab.*", "merges.txt"),
)
_CHUNK = 1 << 20


class TextFormat(TextSettings):
    """How prompt and response become tokens, with the longest sequence that the model reads."""

    max_length: int = Field(ge=2)


class RewardCard(Settings):
    """`reward.json`. Lists have one number a member; raw scores are those of the saved weights.

    A member's score is (raw − length_slope·length − mean)/std, with length in response tokens without the
    end token: mean 0 and variance 1 over the responses of the training pairs.
    """

    format: Literal["headrace reward model"] = "headrace reward model"
    format_version: Literal[1] = 1
    kind: Kind
    loss: Loss
    rule: Rule
    coefficient: float = 1.0
    members: int = Field(ge=1)
    mean: list[float]
    std: list[float]
    length_slope: list[float]
    text: TextFormat
    labels: int = Field(ge=0, description="Training pairs.")
    label_keys_sha256: str = ""
    base_model: str = ""
    data: str = ""
    seed: int = 0
    accuracy: float | None = None
    accuracy_ci95: list[float] | None = None
    heldout_pairs: int = 0
    version: str = ""

    @model_validator(mode="after")
    def _one_number_a_member(self) -> Self:
        for name in ("mean", "std", "length_slope"):
            if len(getattr(self, name)) != self.members:
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers for {self.members} members")
        if any(not 0 < std < math.inf for std in self.std):
            raise ValueError(f"std = {self.std}: every one must be above 0")
        return self


def member_folder(folder: Path, member: int, members: int) -> Path:
    """Where a member's weights lie: the folder itself where it is the only one."""
    return folder if members == 1 else folder / f"member_{member}"


def read_card(folder: str | Path, *, check_version: bool = True) -> RewardCard:
    """Read `reward.json`. ValueError where it is missing, malformed, or not of the weights beside it."""
    folder = Path(folder).expanduser()
    path = folder / CARD
    if not path.is_file():
        raise ValueError(
            f"reward model {str(folder)!r}: it has no {CARD}; give the folder `reward_model` of a run with "
            'objective = "reward_model"'
        )
    try:
        card = RewardCard.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"reward model {str(folder)!r}: {CARD} cannot be read ({error})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or CARD
        raise ValueError(
            f"reward model {str(folder)!r}: {where} in {CARD}: {first['msg']}; train the model again, or "
            "use the version of headrace that wrote it"
        ) from None
    if check_version and (found := weights_version(folder, card)) != card.version:
        raise ValueError(
            f"reward model {str(folder)!r}: its files give version {found[:12]}, but {CARD} says "
            f"{card.version[:12] or 'none'}: they were changed after training; train it again"
        )
    return card


def write_card(folder: Path, card: RewardCard, label_keys: Iterable[str]) -> RewardCard:
    """Write card and label keys beside the weights, which must be there; gives the card with its version."""
    text = "".join(f"{key}\n" for key in sorted(set(label_keys)))
    _write(folder / LABEL_KEYS, text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    card = card.model_copy(update={"label_keys_sha256": digest})
    card = card.model_copy(update={"version": weights_version(folder, card)})
    _write(folder / CARD, json.dumps(card.model_dump(mode="json"), indent=2) + "\n")
    return card


def read_label_keys(folder: str | Path) -> frozenset[str]:
    """The prompt keys of the labels that a model was trained on; ValueError if they are not the card's."""
    folder = Path(folder).expanduser()
    card = read_card(folder, check_version=False)
    try:
        text = (folder / LABEL_KEYS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"reward model {str(folder)!r}: {LABEL_KEYS} cannot be read ({error}), so nobody can tell which "
            "labels it was trained on; train it again"
        ) from None
    if hashlib.sha256(text.encode()).hexdigest() != card.label_keys_sha256:
        raise ValueError(
            f"reward model {str(folder)!r}: {LABEL_KEYS} is not the file that its training wrote; "
            "restore it or train the model again"
        )
    return frozenset(text.split())


def weights_version(folder: Path, card: RewardCard) -> str:
    """SHA-256 over the folder's weights, tokenizer and configuration, and what turns them into a score."""
    digest = hashlib.sha256()
    scoring = card.model_dump(
        mode="json",
        include={"kind", "rule", "coefficient", "members", "mean", "std", "length_slope", "text"},
    )
    digest.update(json.dumps(scoring, sort_keys=True).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        counts = any(fnmatchcase(path.name, pattern) for pattern in _IN_VERSION)
        if counts and name not in _OUTSIDE_VERSION and not path.name.startswith("."):
            digest.update(f"\0{name}\0{_sha256(path)}".encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    """Whole or not at all, readable for this user alone."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(name).replace(path)
