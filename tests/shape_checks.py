"""The run-time type checker that tests put around every function of the package: beartype, minus what it cannot check.

jaxtyping hands over single functions, so beartype cannot know what `typing.Self` means in them, and no one can ask at
run time whether an object follows a protocol that is not `runtime_checkable`. Such an annotation is replaced by
`object`; the shapes of the other arguments and of the result stay checked.
"""

from collections.abc import Callable

from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from beartype.roar import BeartypeException

CONF = BeartypeConf(is_pep484_tower=True)  # an int where a float is asked for is fine


def check(function: Callable) -> Callable:
    """The function, its arguments and result checked at each call."""
    try:
        return beartype(conf=CONF)(function)
    except BeartypeException:
        hints = function.__annotations__
        function.__annotations__ = {name: hint if is_checkable(hint) else object for name, hint in hints.items()}
        return beartype(conf=CONF)(function)


def is_checkable(hint: object) -> bool:
    """Whether beartype can test a value against this annotation (names in quotes are looked up later, so they pass)."""
    if isinstance(hint, str):
        return True
    try:
        is_bearable(None, hint)
    except BeartypeException:
        return False
    return True
