from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from pilotfish.demo import distill, generate, store, train  # noqa: E402
from pilotfish.demo import tokenizer as tok  # noqa: E402
from pilotfish.demo.batches import Source  # noqa: E402
from pilotfish.demo.layout import Layout  # noqa: E402
from pilotfish.demo.model import LanguageModel  # noqa: E402
from pilotfish.demo.pair import TARGET_DIR  # noqa: E402
from pilotfish.demo.shape import Shape  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.slow]

TINY = Shape(64, 1, 1, 1, 64)


@pytest.fixture
def source() -> Source:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Source(tok.load(TARGET_DIR), 0)


def test_rate_is_held_until_half_time_and_ends_at_nothing() -> None:
    assert train.rate(0.0, 0) < 0.1
    assert [train.rate(at, 1000) for at in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]


def test_training_restarts_from_its_checkpoint(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    supply = lambda: train.target_losses(source, 200, 60)  # noqa: E731
    first = train.Trainer(LanguageModel(TINY), 1.0)
    first.run(supply, path, every=0.2)
    again = train.Trainer(LanguageModel(TINY), 2.0)
    again.restore(path)
    assert (again.step, again.seconds) == (first.step, first.seconds)
    for name, p in again.model.named_parameters():
        assert torch.equal(p, first.model.state_dict()[name])
    again.run(supply, path, every=0.2)
    assert again.step > first.step
    assert again.means["tasks"] < 8.4


def test_prompt_tokens_do_not_count(source: Source) -> None:
    ids, counts = source.turn()
    assert ids[counts.index(True) - 1] == tok.ASSISTANT
    assert ids[-1] == tok.END


def test_cached_generation_equals_the_whole_forward_pass(source: Source) -> None:
    model = LanguageModel(TINY).eval()
    prompts = [[5, 6, 7, 8, 9, 10], [20, 21], [30, 31, 32]]
    made = generate.extend(model, prompts, 8, stop=())
    for prompt, said in zip(prompts, made, strict=True):
        ids = prompt + said
        with torch.inference_mode():
            best = model(torch.tensor(ids), Layout.of_lengths([len(ids)])).argmax(-1).tolist()
        assert best[len(prompt) - 1 : -1] == said


def test_draft_learns_only_what_the_target_wrote(source: Source, tmp_path: Path) -> None:
    teacher = LanguageModel(TINY).eval()
    lessons = distill.own_text(teacher, source, n_tasks=4, n_code=4)
    assert {len(lessons["tasks"]), len(lessons["code"])} == {4}
    ids, n_prompt = lessons["tasks"][0]
    batch = distill.pick(source.rng, [(ids, n_prompt)], 1)
    assert batch.wanted.tolist() == ids[n_prompt:]
    trainer = train.Trainer(LanguageModel(TINY), 0.5)
    trainer.run(lambda: distill.losses(teacher, lessons, source, 100, 100), tmp_path / "draft.pt", every=1)
    assert trainer.step > 0


def test_a_stored_model_comes_back(source: Source, tmp_path: Path) -> None:
    model = LanguageModel(TINY)
    store.save(model, tmp_path / "tiny")
    assert store.load(tmp_path / "tiny").shape == TINY
    for name, p in store.load(tmp_path / "tiny").named_parameters():
        assert torch.equal(p, model.state_dict()[name].bfloat16().float())
