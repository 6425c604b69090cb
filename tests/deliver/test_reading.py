"""Files of people as inputs: the same in every form, or one sentence on what does not fit."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest

from umbel import ConfigError
from umbel.clients.data.datasets import as_images
from umbel.clients.data.examples import Examples
from umbel.clients.data.inputs import (
    Columns,
    Inputs,
    Letters,
    Pixels,
    Plain,
    Samples,
    from_json,
    to_json,
)
from umbel.deliver.serving.reading import read_inputs

FASHION = Pixels(28, 28, mean=(0.2860,), std=(0.3530,))
TABLE = Columns(("age", "weight"), (50.0, 70.0), (10.0, 20.0))
ALL: list[Inputs] = [
    FASHION,
    Pixels(4, 5, 3, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
    Pixels(4, 5, flat=True),
    TABLE,
    Columns(("a",)),
    Letters("abc", 4),
    Samples(8000, 6),
    Plain((2, 3)),
    Plain((3,), "int64"),
]


def whole(path: Path, inputs: Inputs) -> np.ndarray:
    return np.concatenate([piece.x for piece in read_inputs(path, inputs)])


@pytest.mark.parametrize("inputs", ALL, ids=lambda one: one.KIND)
def test_what_a_file_says_comes_back(inputs: Inputs) -> None:
    assert from_json(json.loads(json.dumps(to_json(inputs)))) == inputs


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="knows the kinds array, image"):
        from_json({"kind": "smell"})
    with pytest.raises(ConfigError, match="nothing about inputs"):
        from_json({"kind": "table", "names": []})


def test_an_image_file_is_the_images_of_training(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(tmp_path / f"{number}.png")
    np.save(tmp_path.with_suffix(".npy"), pixels)
    wanted = as_images(Examples(pixels, np.zeros(3))).x
    assert np.array_equal(whole(tmp_path, FASHION), wanted)
    assert np.array_equal(whole(tmp_path.with_suffix(".npy"), FASHION), wanted)


def test_tables_are_read_by_name_in_every_order(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    rows = "".join(f"{50 + i},x,{70 + 2 * i}\n" for i in range(3000))  # more than one piece
    file.write_text("\ufeffage,more,weight\n" + rows)
    found = whole(file, TABLE)
    assert found.shape == (3000, 2) and np.allclose(found[20], [2.0, 2.0])
    names = [name for piece in read_inputs(file, TABLE) for name in piece.names]
    assert names[0] == f"{file}:1" and names[-1] == f"{file}:3000"
    as_list = tmp_path / "rows.json"
    as_list.write_text(
        json.dumps({"inputs": [{"weight": 70, "age": 60}, {"age": 50, "weight": 90}]})
    )
    assert whole(as_list, TABLE).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_parquet_is_read_as_a_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"weight": [70.0, 90.0], "age": [60, 50]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert whole(tmp_path / "rows.parquet", TABLE).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_texts_and_sounds(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("abcab\n\nc?\n")
    assert whole(tmp_path / "lines.txt", Letters("abc", 4)).tolist() == [[2, 3, 1, 2], [0, 0, 3, 0]]
    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(np.asarray([0, 16384, -32768], "<i2").tobytes())
    assert whole(tmp_path / "a.wav", Samples(8000, 5)).tolist() == [[0, 0.5, -1, 0, 0]]
    with pytest.raises(ConfigError, match="8000 samples a second, but the model takes 16000"):
        whole(tmp_path / "a.wav", Samples(16000, 5))


def test_broken_inputs_get_one_sentence_each(tmp_path: Path) -> None:
    from PIL import Image

    def refused(name: str, content: bytes | str, inputs: Inputs, said: str) -> None:
        file = tmp_path / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(ConfigError, match=said) as caught:
            whole(file, inputs)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)

    Image.fromarray(np.zeros((64, 32), np.uint8)).save(tmp_path / "big.png")
    big = (tmp_path / "big.png").read_bytes()
    refused("big.png", big, FASHION, "32 x 64 pixels, but the model takes 28 x 28")
    refused("big.png", big, TABLE, "an image was given, but the model takes rows of 2 numbers")
    noise = np.random.default_rng(0).integers(0, 256, (28, 28)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:300]
    refused("cut.png", cut, FASHION, "this image is damaged")
    refused("text.png", "hello", FASHION, "no image that can be read")
    refused("empty.csv", "", TABLE, "the table is empty")
    refused("head.csv", "age,weight\n", TABLE, "the table is empty")
    refused("few.csv", "age\n1\n", TABLE, "row 1: the column 'weight' is missing")
    refused("word.csv", "age,weight\n1,2\n3,heavy\n", TABLE, "row 2: an input is .*'heavy'")
    refused("nan.csv", "age,weight\n1,nan\n", TABLE, "'weight' holds a value that is no finite")
    refused("wide.csv", "a,b\n1,2\n", Plain((3,)), "a row has 2 values, but an input .* has 3")
    refused("latin.csv", b"age,weight\n\xe4,2\n", TABLE, "cannot be read as .csv|not in UTF-8")
    refused("bad.npy", "hello", Plain((3,)), "no array of numbers in the form .npy")
    refused("bad.wav", "hello", Samples(8000, 5), "no sound in the form .wav")
    refused("a.txt", "hello", FASHION, "a text was given, but the model takes images of 28")
    refused("a.json", "{", TABLE, "this is no JSON")
    refused("b.json", '{"input": []}', TABLE, 'no list "inputs"')
    refused("c.json", '{"inputs": [[1, 2], [1]]}', TABLE, "no array of numbers")
    refused("d.doc", "x", TABLE, "ends in .doc, which is no known kind")
    np.save(tmp_path / "shape.npy", np.zeros((2, 4)))
    content = (tmp_path / "shape.npy").read_bytes()
    refused("shape.npy", content, Plain((3,)), "an input has the shape 4, but the model takes 3")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    content = (tmp_path / "object.npy").read_bytes()
    refused("object.npy", content, Plain((3,)), "no array of numbers")
    refused("broken.json", '{"inputs": [[1.5, 2, 3]]}', Plain((3,), "int64"), "broken numbers")
    with pytest.raises(ConfigError, match="there is no file or folder"):
        whole(tmp_path / "nothing.csv", TABLE)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="holds no file that could be an input"):
        whole(tmp_path / "none", TABLE)
