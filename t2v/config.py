"""A network's hyper-parameters, from the config.json that diffusers or transformers wrote beside its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from t2v.errors import WeightsError


@dataclass(frozen=True)
class Config:
    """Fields are named as the file's keys; those that the file lacks keep their default.

    Attributes:
        NETWORK: folder of the file in a model's.
        FIXED: keys of which one value is all that the network implements.
        OTHERS: keys that do not concern the network; None where that is every other key. Private ones never do.
    """

    NETWORK: ClassVar[str]
    FIXED: ClassVar[Mapping[str, Any]] = {}
    OTHERS: ClassVar[frozenset[str] | None] = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a file's content.

        Raises:
            WeightsError: it asks for a variant of the network that is not implemented.
        """
        known = {field.name for field in fields(cls)}
        values = {}
        for key, value in config.items():
            if key in known:
                values[key] = tuple(value) if isinstance(value, list) else value
            elif key in cls.FIXED:
                if value != cls.FIXED[key]:
                    raise WeightsError(
                        f"{cls.NETWORK}/config.json: {key} = {value!r} is not supported, only {cls.FIXED[key]!r}"
                    )
            elif not (cls.OTHERS is None or key in cls.OTHERS or key.startswith("_")):
                raise WeightsError(f"{cls.NETWORK}/config.json: unknown key {key!r}; is this another network?")
        return cls(**values)
