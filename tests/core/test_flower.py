"""What Umbel assumes of Flower beyond its public names, against the release that is installed."""

import sys
from pathlib import Path

import pytest
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE

from umbel.core import flower


def test_the_numbers_of_errors_are_flowers() -> None:
    assert flower.RAISED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert flower.CRASHED == ErrorCode.CLIENT_APP_CRASHED
    assert flower.UNAVAILABLE == ErrorCode.NODE_UNAVAILABLE
    assert flower.UNKNOWN == ErrorCode.MESSAGE_UNAVAILABLE


def test_an_answer_about_no_message_is_flowers() -> None:
    answer = flower.no_such_message("unheard-of", 7)
    about = answer.metadata
    assert answer.error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert (about.reply_to_message_id, about.run_id) == ("unheard-of", 7)
    assert about.message_type == SYSTEM_MESSAGE_TYPE


def test_a_release_that_has_moved_a_part_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Path(flower.__file__).read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "flwr.supercore.task_identity", None)
    with pytest.raises(ImportError, match=r"flwr \S+ keeps flwr\.supercore\.task_identity .*pip"):
        exec(compile(source, flower.__file__, "exec"), {"__name__": "moved"})
