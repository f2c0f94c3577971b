"""Judging the answers of a run: over HTTP, with a server that misbehaves, and with a model on this machine."""

import json
import time

import pytest
import torch
from judge_server import GARBAGE, JudgeServer
from miniatures import write_video_chatgpt, write_zero_shot_qa

from video_panda.evaluation.benchmarks import open_benchmark
from video_panda.evaluation.judges import Judge, JudgeUnreachableError, Reply, TransformersJudge, open_judge
from video_panda.evaluation.judging import judge_run
from video_panda.evaluation.run_folder import Answer, RunFolder

openai = pytest.importorskip("openai")
from video_panda.evaluation.judges import OpenAIJudge  # noqa: E402


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def qa(clips, tmp_path_factory):
    return open_benchmark(
        "activitynet-qa", write_zero_shot_qa(tmp_path_factory.mktemp("qa") / "data", clips, num_clips=8)
    )


def answered(folder, benchmark, wrong_every: int = 3):
    """A complete run with every third answer wrong, as `evaluate` leaves it."""
    run = RunFolder(folder, {"benchmark": benchmark.name})
    for place, question in enumerate(benchmark.questions):
        answer = "nothing" if place % wrong_every == 0 else f"The {question.answer}."
        run.add([question], [Answer(f"{answer} {'' if place % 2 else ' '}".strip())])
    run.gather(benchmark.questions)
    run.close()
    return folder


def judge_with(server, folder, benchmark, **options):
    options = {"num_at_once": 4, "timeout_s": 1.0, "max_retries": 3, **options}
    return judge_run(folder, benchmark, OpenAIJudge("judge", server.url, **options), show_progress=False)


def test_verdicts_are_counted_by_kind(qa, tmp_path):
    folder = answered(tmp_path / "run", qa)
    with JudgeServer() as server:
        table = judge_with(server, folder, qa)
    num_questions = len(qa.questions)
    is_right = [place % 3 != 0 for place in range(num_questions)]
    assert table.total.num_judged == num_questions
    assert table.total.accuracy.value == pytest.approx(sum(is_right) / num_questions)
    assert table.total.score.value == pytest.approx(sum(5 if right else 1 for right in is_right) / num_questions)
    assert table.total.accuracy.low < table.total.accuracy.value < table.total.accuracy.high
    assert [row.kind for row in table.rows] == list(qa.kinds)
    assert sum(row.num_judged for row in table.rows) == num_questions
    (own,) = (folder / "judges").iterdir()
    kept = json.loads((own / "judge.json").read_text())
    assert (kept["judge"], kept["base_url"], kept["temperature"]) == ("judge", server.url, 0)
    assert kept["templates"] == {"qa": "qa-1"}
    assert json.loads((own / "scores.json").read_text())["total"]["num_judged"] == num_questions
    lines = [json.loads(line) for line in (own / "verdicts.jsonl").read_text().splitlines()]
    first = lines[0]
    assert {"key", "id", "messages", "reply", "model", "date", "verdict", "template"} <= set(first)
    assert first["model"] == "judge-2026", "the server knows better which model it was"
    assert {body["temperature"] for body in server.requests} == {0}


def test_the_same_content_is_asked_once(qa, tmp_path):
    folder = answered(tmp_path / "run", qa)
    with JudgeServer() as server:
        first = judge_with(server, folder, qa)
        num_requests = len(server.requests)
        assert num_requests < len(qa.questions), "two red objects of one question make one request"
        prompts = [json.dumps(body["messages"]) for body in server.requests]
        assert len(set(prompts)) == num_requests
        again = judge_with(server, folder, qa)
        assert len(server.requests) == num_requests
    assert again == first


def test_faults_are_tried_again_and_garbage_is_counted_and_not_scored(qa, tmp_path):
    folder = answered(tmp_path / "run", qa)
    faults = [
        "429",
        "500",
        "fenced",
        "close",
        "timeout",
        "no json",
        *[f"reply {text}" for text in GARBAGE],
        "429",
        "fenced",
    ]
    with JudgeServer(faults) as server:
        table = judge_with(server, folder, qa, num_at_once=1)
        num_keys = len({json.dumps(body["messages"]) for body in server.requests})
    (own,) = (folder / "judges").iterdir()
    lines = [json.loads(line) for line in (own / "verdicts.jsonl").read_text().splitlines()]
    unparsed = [line for line in lines if line["verdict"] is None]
    assert len(unparsed) == len(GARBAGE)
    assert [line["reply"] for line in unparsed] == GARBAGE
    assert all(line["unparsed"] for line in unparsed)
    total = table.total
    assert total.num_judged + total.num_unparsed + total.num_failed == len(qa.questions)
    assert total.num_unparsed >= len(GARBAGE)
    # An answer that is no JSON is not tried again by the client; the next call does.
    assert total.num_failed > 0
    with JudgeServer() as second:
        later = judge_run(folder, qa, _moved(server, second), show_progress=False)
        assert len(second.requests) == num_keys - len(lines)
    assert later.total.num_failed == 0
    assert later.total.num_unparsed == total.num_unparsed
    assert 1 <= later.total.score.value <= 5


def _moved(first, second):
    """The judge of the first server, asked at the second one's place."""
    judge = OpenAIJudge("judge", second.url)
    judge.base_url = first.url
    return judge


def test_a_server_that_is_down_says_so_and_nothing_is_lost(qa, tmp_path):
    folder = answered(tmp_path / "run", qa)
    before = (folder / "answers.jsonl").read_bytes()
    with JudgeServer(is_down=True) as server, pytest.raises(JudgeUnreachableError, match=r"requests in a row.*500"):
        judge_with(server, folder, qa, max_retries=1)
    begin = time.monotonic()
    with pytest.raises(JudgeUnreachableError, match=r"no answer to .* requests in a row: APIConnectionError"):
        judge_run(folder, qa, OpenAIJudge("judge", server.url, max_retries=0), show_progress=False)
    assert time.monotonic() - begin < 10
    assert (folder / "answers.jsonl").read_bytes() == before


def test_verdicts_before_the_server_went_down_are_kept(qa, tmp_path):
    folder = answered(tmp_path / "run", qa)
    with JudgeServer([None] * 5 + ["500"] * 100) as server:
        with pytest.raises(JudgeUnreachableError):
            judge_with(server, folder, qa, num_at_once=1, max_retries=0)
        (own,) = (folder / "judges").iterdir()
        assert len((own / "verdicts.jsonl").read_text().splitlines()) == 5
        assert not (own / "scores.json").exists()


def test_what_no_retry_can_mend_ends_at_once(qa, tmp_path):
    folder = answered(tmp_path / "run", qa)
    with JudgeServer() as server:
        with pytest.raises(JudgeUnreachableError, match="refuses to ask other: NotFoundError"):
            judge_run(folder, qa, OpenAIJudge("other", server.url, num_at_once=1), show_progress=False)
        assert len(server.requests) <= 2
    with JudgeServer(["401"] * 50) as server, pytest.raises(JudgeUnreachableError, match="AuthenticationError"):
        judge_with(server, folder, qa)


def test_the_five_scores(clips, tmp_path):
    benchmark = open_benchmark("video-chatgpt", write_video_chatgpt(tmp_path / "data", clips))
    folder = answered(tmp_path / "run", benchmark, wrong_every=100)
    with JudgeServer() as server:
        table = judge_with(server, folder, benchmark)
    assert [row.kind for row in table.rows] == ["correctness", "detail", "context", "temporal", "consistency"]
    assert [row.num_judged for row in table.rows] == [4] * 5
    assert all(row.accuracy is None for row in (*table.rows, table.total))
    assert table["temporal"].score.value == 5
    assert table["correctness"].score.value == 4  # the first of four answers is wrong
    assert "| temporal | 4 |  |  | 5.00 | 5.00 to 5.00 | 0 | 0 |" in table.to_markdown()


def write_local_judge(folder, replies_of: str = "byte_bpe"):
    """A tiny language model with a chat template; what it writes is no verdict."""
    from tiny import tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(replies_of)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=4096)).save_pretrained(
        folder
    )
    return folder


def test_a_model_on_this_machine_judges(qa, tmp_path, monkeypatch):
    folder = answered(tmp_path / "run", qa)
    judge = TransformersJudge(str(write_local_judge(tmp_path / "judge")), device="cpu", batch_size=4, max_tokens=6)
    babble = judge_run(folder, qa, judge, show_progress=False)
    assert babble.total.num_unparsed == len(qa.questions)
    assert babble.total.score is None
    assert babble.total.num_judged == 0
    assert babble.to_markdown()
    alone = TransformersJudge(str(tmp_path / "judge"), device="cpu", batch_size=1, max_tokens=6)
    prompts = [[{"role": "user", "content": text}] for text in ("Which?", "What happens in this video?", "A")]
    by_place = [dict(pair for group in own.reply_all(prompts) for pair in group) for own in (judge, alone)]
    assert by_place[0] == by_place[1]
    # A model that does answer: the tokens of a verdict, whatever it is asked.
    ids = torch.tensor(judge._tokenizer('{"verdict": "yes", "score": 5}', add_special_tokens=False)["input_ids"])
    monkeypatch.setattr(
        judge._model,
        "generate",
        lambda input_ids, **options: torch.cat([input_ids, ids.expand(len(input_ids), -1)], dim=1),
    )
    (own,) = (folder / "judges").iterdir()
    (own / "verdicts.jsonl").unlink()
    table = judge_run(folder, qa, judge, show_progress=False)
    assert (table.total.accuracy.value, table.total.score.value) == (1, 5)


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    from tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        TransformersJudge(str(tmp_path))


class Scripted(Judge):
    """Replies from a list; an exception in it is raised."""

    model, backend = "scripted", "test"

    def __init__(self, replies):
        self.replies = list(replies)

    def reply_all(self, prompts):
        for place in range(len(prompts)):
            reply = self.replies.pop(0)
            if isinstance(reply, BaseException):
                raise reply
            yield [(place, reply)]


def test_an_interrupted_judge_goes_on(qa, tmp_path):
    folder = answered(tmp_path / "run", qa)
    yes = Reply('{"verdict": "yes", "score": 5}', "scripted")
    with pytest.raises(KeyboardInterrupt):
        judge_run(folder, qa, Scripted([yes, yes, KeyboardInterrupt()]), show_progress=False)
    (own,) = (folder / "judges").iterdir()
    with open(own / "verdicts.jsonl", "a") as file:
        file.write('{"key": "cut o')
    rest = Scripted([yes] * 100)
    table = judge_run(folder, qa, rest, show_progress=False)
    assert table.total.num_judged == len(qa.questions)
    kept = [json.loads(line) for line in (own / "verdicts.jsonl").read_text().splitlines()]
    assert len(kept) == 2 + 100 - len(rest.replies)


def test_what_cannot_be_judged(qa, clips, tmp_path):
    judge = Scripted([])
    with pytest.raises(ValueError, match="no folder of a run"):
        judge_run(tmp_path, qa, judge)
    folder = answered(tmp_path / "run", qa)
    other = open_benchmark("msvd-qa", qa.folder)
    with pytest.raises(ValueError, match="holds a run of 'activitynet-qa', not of 'msvd-qa'"):
        judge_run(folder, other, judge)
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (folder / "answers.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=f"1 questions are not answered yet, the first is {qa.questions[0].id}"):
        judge_run(folder, qa, judge)


@pytest.mark.parametrize(
    ("model", "url", "message"),
    [
        (None, "http://localhost", "none is named: give --judge"),
        ("m", "localhost:8000", "expected one that begins with http:// or https://"),
        ("m", "file:///etc", "expected one that begins with"),
    ],
)
def test_a_judge_that_cannot_be_named(model, url, message):
    with pytest.raises(ValueError, match=message):
        open_judge(model, url)
