"""A network's hyper-parameters, in the config.json that diffusers or transformers keep beside its weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from t2v.errors import WeightsError


@dataclass(frozen=True)
class Config:
    """Fields are named as the file's keys. A field whose key the file lacks keeps its default.

    Attributes:
        FOLDER: the network's folder in a model's folder.
        REQUIRED_VALUES: keys for which the network implements only this value.
        IGNORED_KEYS: keys to ignore; None ignores every unknown key. Keys starting with `_` are always ignored.
        FILE_KEYS: further keys of a written file, for diffusers and transformers.
    """

    FOLDER: ClassVar[str]
    REQUIRED_VALUES: ClassVar[Mapping[str, Any]] = {}
    IGNORED_KEYS: ClassVar[frozenset[str] | None] = None
    FILE_KEYS: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the content of a file.

        Raises:
            WeightsError: it asks for a variant of the network that is not implemented.
        """
        known = {field.name for field in fields(cls)}
        values = {}
        for key, value in config.items():
            if key in known:
                values[key] = tuple(value) if isinstance(value, list) else value
            elif key in cls.REQUIRED_VALUES:
                if value != cls.REQUIRED_VALUES[key]:
                    raise WeightsError(
                        f"{cls.FOLDER}/config.json: {key} = {value!r} is not supported, "
                        f"only {cls.REQUIRED_VALUES[key]!r}"
                    )
            elif not (cls.IGNORED_KEYS is None or key in cls.IGNORED_KEYS or key.startswith("_")):
                raise WeightsError(f"{cls.FOLDER}/config.json: unknown key {key!r}; is this another network?")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of a file, as JSON values."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {**self.FILE_KEYS, **values}
