"""What is measured of cautious decoding's texts."""

import pytest
import torch

from pertoken.reproduce._cautious_units import _figures, _losses, _read, equations
from pertoken.testing import ByteTokenizer, tiny_model
from pertoken.testing.setups import left_pad


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("16 - 3 - 4 = 9 eggs, 9 * $2 = $18", (2, 2)),
        ("60/100 * 5 = $3.00 and 1,000 + 1 = 1001", (2, 2)),
        ("2 + 3 * 4 = 14, not 2 + 3 * 4 = 20", (1, 2)),
        ("20% * 10 = 2", (0, 0)),  # what the percentage is of can't be told
        ("5 / 0 = 5", (0, 0)),
        ("x = 5, so it is 5 = 5", (0, 0)),
        ("10 / 3 = 3.33 and 10 / 3 = 3.3", (1, 2)),
    ],
)
def test_equations_are_read_whole(text: str, found: tuple[int, int]) -> None:
    assert equations(text) == found


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_losses_behind_a_cache_are_those_of_the_whole_text(kind: str) -> None:
    model = tiny_model(kind)
    rows = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 4]), torch.tensor([3, 3, 3])]
    texts = [[4, 5], [], [7, 8, 9, 10]]
    ids, mask = left_pad(rows, 0)
    found = _losses(model, _read(model, ids, mask), ids[:, -1:], mask, texts)
    for row, text, loss in zip(rows, texts, found, strict=True):
        whole = torch.cat((row, torch.tensor(text, dtype=torch.long)))[None]
        chances = model(whole).logits[0].log_softmax(-1)[len(row) - 1 : -1]
        wanted = -chances.gather(-1, whole[0, len(row) :, None]).sum()
        assert loss == pytest.approx(wanted.item(), abs=1e-5)
    assert _losses(model, None, ids[:, -1:], mask, [[], [], []]) == [0.0] * 3


def test_figures_count_pairs_of_all_draws_and_what_was_cut() -> None:
    reader = ByteTokenizer()
    texts = [reader.encode("abab"), reader.encode("ab"), []]
    found = _figures(reader, texts, "7", 4)
    assert (found["pairs"], found["distinct_pairs"]) == (4, 2)
    assert (found["cut"], found["empty"], found["right"]) == (1 / 3, 1 / 3, 0)
    assert found["distinct"] == pytest.approx(2 / 3)
