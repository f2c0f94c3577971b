"""The tests' own Hub, seen through the client libraries: what they push is what they get back."""

import hashlib
import json
import math
import textwrap
import urllib.error
import urllib.request

import pytest
from hub_server import HubServer, run_client

INLINE = {"lfs_threshold_bytes": math.inf, "lfs_suffixes": ()}
LFS = {"lfs_threshold_bytes": math.inf, "lfs_suffixes": (".safetensors",)}
LFS_BY_SIZE = {"lfs_threshold_bytes": 1000, "lfs_suffixes": ()}


def check_faultless(server):
    assert server.unknown_requests == []
    assert server.internal_errors == []


def last_line(process):
    """What the client printed last, from JSON."""
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture
def folder(tmp_path):
    """A folder to upload: text, a nested file, an empty one, a README with metadata, 4 kB of safetensors."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [4000], "data_offsets": [0, 4000]}}).encode()
    contents = {
        "README.md": b"---\ntags:\n- tiny\nlicense: apache-2.0\n---\n# A model\n",
        "config.json": b'{"hidden_size": 16}',
        "empty.txt": b"",
        "model.safetensors": len(header).to_bytes(8, "little") + header + bytes(range(250)) * 16,
        "sub/deep/merges.txt": "naïve façade\n".encode(),
    }
    for path, content in contents.items():
        (tmp_path / "upload" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "upload" / path).write_bytes(content)
    return tmp_path / "upload", contents


UPLOAD = """
    import os
    from huggingface_hub import HfApi

    api = HfApi()
    assert api.create_repo("user/files").repo_id == "user/files"
    assert api.create_repo("files", exist_ok=True).repo_id == "user/files"
    print(api.upload_folder(repo_id="user/files", folder_path=os.environ["FOLDER"]).oid)
"""


@pytest.mark.parametrize("settings", [INLINE, LFS, LFS_BY_SIZE], ids=["inline", "lfs", "lfs-by-size"])
def test_a_folder_comes_back_as_it_was_uploaded(folder, tmp_path, settings):
    path, contents = folder
    with HubServer(**settings) as server:
        commit_id = run_client(UPLOAD, server, tmp_path / "writer", FOLDER=str(path)).stdout.strip()
        found = last_line(
            run_client(
                """
                import json
                from pathlib import Path
                from huggingface_hub import HfApi, hf_hub_download, snapshot_download

                api = HfApi(token=False)
                info = api.model_info("user/files", files_metadata=True)
                one = hf_hub_download("user/files", "model.safetensors")
                root = Path(snapshot_download("user/files"))
                print(json.dumps({
                    "sha": info.sha,
                    "tags": info.tags,
                    "license": info.card_data.license,
                    "siblings": [[file.rfilename, file.size, file.lfs and file.lfs.sha256] for file in info.siblings],
                    "files": api.list_repo_files("user/files"),
                    "entries": [entry.path for entry in api.list_repo_tree("user/files", "sub")],
                    "paths": [entry.path for entry in api.get_paths_info("user/files", ["sub", "config.json", "no"])],
                    "mismatches": api.verify_repo_checksums("user/files").mismatches,
                    "one": Path(one).read_bytes().hex(),
                    "all": {str(f.relative_to(root)): f.read_bytes().hex() for f in root.rglob("*") if f.is_file()},
                }))
                """,
                server,
                tmp_path / "reader",
            )
        )
    check_faultless(server)
    assert {path: file.content for path, file in server.repositories["user/files"].files().items()}.items() > (
        contents.items()
    )
    assert found["sha"] == commit_id
    assert (found["tags"], found["license"]) == (["tiny"], "apache-2.0")
    assert found["files"] == sorted([".gitattributes", *contents])
    assert (found["entries"], found["paths"], found["mismatches"]) == (["sub/deep"], ["sub", "config.json"], [])
    assert {path: bytes.fromhex(content) for path, content in found["all"].items()}.items() > contents.items()
    assert bytes.fromhex(found["one"]) == contents["model.safetensors"]
    sha256 = hashlib.sha256(contents["model.safetensors"]).hexdigest()
    is_lfs = settings is not INLINE
    assert ["model.safetensors", len(contents["model.safetensors"]), sha256 if is_lfs else None] in found["siblings"]
    assert [size for name, size, lfs in found["siblings"] if lfs] == [len(contents["model.safetensors"])] * is_lfs
    assert (("PUT", f"/lfs/{sha256}") in server.requests) == (("POST", "/lfs/verify") in server.requests) == is_lfs


def test_history_and_unchanged_files(folder, tmp_path):
    path, contents = folder
    with HubServer(**LFS) as server:
        first = run_client(UPLOAD, server, tmp_path / "home", FOLDER=str(path)).stdout.strip()
        found = last_line(
            run_client(
                """
                import json, os
                from pathlib import Path
                from huggingface_hub import HfApi

                api, repo, first = HfApi(), "user/files", os.environ["FIRST"]
                unchanged = api.upload_folder(repo_id=repo, folder_path=os.environ["FOLDER"]).oid
                second = api.upload_file(repo_id=repo, path_or_fileobj=b"{}", path_in_repo="config.json").oid
                third = api.delete_file("sub/deep/merges.txt", repo).oid
                api.create_branch(repo, branch="dev/a", revision=first)
                dev = api.upload_file(repo_id=repo, path_or_fileobj=b"dev", path_in_repo="a", revision="dev/a").oid
                request = api.upload_file(repo_id=repo, path_or_fileobj=b"pr", path_in_repo="b", create_pr=True)
                try:
                    api.upload_file(repo_id=repo, path_or_fileobj=b"", path_in_repo="late", parent_commit=first)
                except Exception as error:
                    late = error.response.status_code
                ids = {"unchanged": unchanged, "second": second, "third": third, "dev/a": dev}
                revisions = [None, "main", "dev/a", request.pr_revision, first, second, third]
                print(json.dumps({
                    "ids": ids,
                    "shas": [api.model_info(repo, revision=revision).sha for revision in revisions],
                    "request": request.oid,
                    "late": late,
                    "files": {revision: api.list_repo_files(repo, revision=revision) for revision in revisions[1:]},
                    "configs": [
                        Path(api.hf_hub_download(repo, "config.json", revision=revision)).read_text()
                        for revision in (first, second, "main", "dev/a")
                    ],
                }))
                """,
                server,
                tmp_path / "home",
                FOLDER=str(path),
                FIRST=first,
            )
        )
    check_faultless(server)
    ids, old, everything = found["ids"], contents["config.json"].decode(), sorted([".gitattributes", *contents])
    assert ids["unchanged"] == first
    assert len({first, ids["second"], ids["third"], ids["dev/a"], found["request"]}) == 5
    assert found["shas"] == [
        *[ids["third"]] * 2,
        ids["dev/a"],
        found["request"],
        first,
        ids["second"],
        ids["third"],
    ]
    assert found["late"] == 412
    assert found["configs"] == [old, "{}", "{}", old]
    assert found["files"][first] == found["files"][ids["second"]] == everything
    assert found["files"]["main"] == [name for name in everything if not name.startswith("sub")]
    assert found["files"]["dev/a"] == sorted([*everything, "a"])
    assert found["files"]["refs/pr/1"] == sorted([*found["files"]["main"], "b"])
    assert sum(method == "PUT" for method, _ in server.requests) == 1


def test_errors_are_those_of_the_hub(folder, tmp_path):
    path, _ = folder
    with HubServer() as server:
        run_client(UPLOAD, server, tmp_path / "home", FOLDER=str(path))
        found = last_line(
            run_client(
                """
                import json
                from huggingface_hub import HfApi, hf_hub_download, snapshot_download

                api = HfApi()
                calls = [
                    lambda: api.model_info("user/none"),
                    lambda: hf_hub_download("user/none", "config.json"),
                    lambda: snapshot_download("user/none"),
                    lambda: api.upload_file(repo_id="user/none", path_or_fileobj=b"x", path_in_repo="x"),
                    lambda: api.model_info("user/files", revision="v9"),
                    lambda: hf_hub_download("user/files", "config.json", revision="v9"),
                    lambda: hf_hub_download("user/files", "config.json", revision="0" * 40),
                    lambda: hf_hub_download("user/files", "none.json"),
                    lambda: list(api.list_repo_tree("user/files", "none")),
                    lambda: api.create_repo("user/files"),
                    lambda: api.create_repo("user/files", repo_type="dataset"),
                    lambda: HfApi(token="hf_wrong").create_repo("user/other"),
                    lambda: HfApi(token="hf_wrong").whoami(),
                    lambda: api.upload_file(
                        repo_id="user/files", path_or_fileobj=b"---\\na: [\\n---\\n", path_in_repo="README.md"
                    ),
                ]
                errors = []
                for call in calls:
                    try:
                        errors.append(f"no error: {call()}")
                    except Exception as error:
                        status = getattr(getattr(error, "response", None), "status_code", None)
                        errors.append([type(error).__name__, status])
                print(json.dumps([api.whoami()["name"], api.repo_exists("user/none"), errors]))
                """,
                server,
                tmp_path / "home",
            )
        )
    check_faultless(server)
    assert found[:2] == ["user", False]
    assert found[2] == [
        *[["RepositoryNotFoundError", 404]] * 4,
        *[["RevisionNotFoundError", 404]] * 3,
        *[["RemoteEntryNotFoundError", 404]] * 2,
        ["HfHubHTTPError", 409],
        ["BadRequestError", 400],
        *[["HfHubHTTPError", 401]] * 2,
        ["ValueError", None],
    ]
    assert list(server.repositories) == ["user/files"]


def request(url, method="GET", body=None, **headers):
    """Status, headers and body of an answer, without a client library."""
    try:
        wanted = urllib.request.Request(url, body, headers, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(wanted) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_answers_as_bytes(folder, tmp_path):
    path, contents = folder
    content = contents["model.safetensors"]
    with HubServer(**LFS) as server:
        run_client(UPLOAD, server, tmp_path / "home", FOLDER=str(path))
        url = f"{server.url}/user/files/resolve/main/model.safetensors"
        commit_id = server.repositories["user/files"].resolve()
        for method, body in (("GET", content), ("HEAD", b"")):
            status, headers, answer = request(url, method)
            assert (status, answer, headers["Content-Length"]) == (200, body, str(len(content)))
            assert headers["ETag"] == headers["X-Linked-Etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
            assert (headers["X-Linked-Size"], headers["X-Repo-Commit"]) == (str(len(content)), commit_id)
        status, headers, answer = request(url, Range="bytes=1000-1999")
        assert (status, answer, headers["Content-Range"]) == (
            206,
            content[1000:2000],
            f"bytes 1000-1999/{len(content)}",
        )
        assert request(url, Range="bytes=4000-")[2] == content[4000:]
        assert request(url, Range=f"bytes={len(content)}-")[0] == 416
        status, headers, _ = request(f"{server.url}/user/files/resolve/main/config.json", "HEAD")
        git_hash_object = "b807abe3a1abcc9912b6c6e975945a24fb752d8b"  # what `git hash-object` says of it
        assert (headers["ETag"], headers["X-Linked-Etag"]) == (f'"{git_hash_object}"', None)
        status, headers, _ = request(f"{server.url}/user/files/resolve/main/none.json", "HEAD")
        assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", commit_id)
        check_faultless(server)

        objects = dict(server.lfs_objects)
        status, _, answer = request(f"{server.url}/lfs/{'0' * 64}", "PUT", b"other content")
        assert status == 400
        assert "sha256" in json.loads(answer)["error"]
        assert server.lfs_objects == objects
        assert request(f"{server.url}/api/models/user/files/commit/main", "POST", b"{}")[0] == 401
        assert server.unknown_requests == []
        assert request(f"{server.url}/api/models/user/files/likers?limit=1")[0] == 404
        assert server.unknown_requests == [("GET", "/api/models/user/files/likers")]


def test_run_client_isolates_and_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", "nowhere")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    code = """
        import os
        names = {"HF_HUB_OFFLINE", "PYTHONPATH", "http_proxy"} & set(os.environ)
        print(names, os.environ["EXTRA"], os.environ["HF_HOME"], os.listdir())
        try:
            import yaml.nodes
        except ImportError:
            print("no yaml")
    """
    with HubServer() as server:
        process = run_client(code, server, tmp_path / "home", blocked=["yaml"], EXTRA="on")
        assert process.stdout == f"set() on {tmp_path / 'home'} []\nno yaml\n"
        with pytest.raises(RuntimeError, match=r"(?s)printed before.*ZeroDivisionError"):
            run_client("print('printed before'); 1 / 0", server, tmp_path / "home")


CUSTOM_CODE = {
    "__init__.py": "",
    "configuration_tiny.py": """
        from transformers import PreTrainedConfig

        class TinyConfig(PreTrainedConfig):
            model_type = "tiny_of_the_hub_tests"
            vocab_size: int = 32
    """,
    "modeling_tiny.py": """
        from torch import nn
        from transformers import PreTrainedModel
        from transformers.modeling_outputs import CausalLMOutput
        from .configuration_tiny import TinyConfig

        class TinyModel(PreTrainedModel):
            config_class = TinyConfig

            def __init__(self, config):
                super().__init__(config)
                self.table = nn.Embedding(config.vocab_size, config.vocab_size)
                self.post_init()

            def forward(self, input_ids, **kwargs):
                return CausalLMOutput(logits=self.table(input_ids))
    """,
}

PUSH = """
    import json, torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from tiny_custom.configuration_tiny import TinyConfig
    from tiny_custom.modeling_tiny import TinyModel

    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    llama.push_to_hub("user/llama", tags=["tiny"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "panda": 1}, unk_token="<unk>")), unk_token="<unk>"
    )
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "shout": "{{ messages[0].content | upper }}"}
    first = tokenizer.push_to_hub("user/llama").oid
    llama.config.pad_token_id = 5
    llama.config.push_to_hub("user/llama")
    llama.config.pad_token_id = 6
    llama.config.push_to_hub("user/llama", revision="dev")

    TinyConfig.register_for_auto_class()
    TinyModel.register_for_auto_class("AutoModelForCausalLM")
    custom = TinyModel(TinyConfig()).eval()
    custom.push_to_hub("custom", private=True)
    inputs = torch.arange(8)[None]
    print(json.dumps([first, llama(inputs).logits.tolist(), custom(inputs).logits.tolist()]))
"""

LOAD = """
    import json, os, torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    llama = AutoModelForCausalLM.from_pretrained("user/llama")
    configs = [AutoConfig.from_pretrained("user/llama", revision=r) for r in (os.environ["FIRST"], "main", "dev")]
    custom = AutoModelForCausalLM.from_pretrained("user/custom", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("user/llama")
    messages = [{"role": "user", "content": "panda"}]
    chats = [tokenizer.apply_chat_template(messages, chat_template=n, tokenize=False) for n in ("default", "shout")]
    errors = []
    for name, options in (("user/none", {}), ("user/llama", {"revision": "v9"}), ("user/custom", {"trust_remote_code": False})):
        try:
            AutoModelForCausalLM.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            errors.append(type(error).__name__)
    inputs = torch.arange(8)[None]
    print(json.dumps({
        "llama": llama(inputs).logits.tolist(),
        "custom": custom(inputs).logits.tolist(),
        "module": type(custom).__module__,
        "pads": [config.pad_token_id for config in configs],
        "ids": tokenizer("panda").input_ids,
        "chats": chats,
        "errors": errors,
    }))
"""


@pytest.mark.slow  # tests/hub/test_push.py does the same with our models
@pytest.mark.parametrize("settings", [INLINE, LFS], ids=["inline", "lfs"])
def test_pushed_models_load_by_repo_id(tmp_path, settings):
    code = tmp_path / "code" / "tiny_custom"
    code.mkdir(parents=True)
    for name, text in CUSTOM_CODE.items():
        (code / name).write_text(textwrap.dedent(text))
    with HubServer(**settings) as server:
        process = run_client(PUSH, server, tmp_path / "writer", PYTHONPATH=str(code.parent))
        first, llama_logits, custom_logits = last_line(process)
        found = last_line(run_client(LOAD, server, tmp_path / "reader", FIRST=first))
    check_faultless(server)
    assert found["llama"] == llama_logits
    assert found["custom"] == custom_logits
    assert found["module"].startswith("transformers_modules.user.custom.")
    assert found["pads"] == [None, 5, 6]
    assert (found["ids"], found["chats"]) == ([1], ["panda", "PANDA"])
    assert found["errors"] == ["OSError", "OSError", "ValueError"]
    assert [repo.private for repo in server.repositories.values()] == [False, True]
    files = server.repositories["user/llama"].files()
    assert files["model.safetensors"].is_lfs == (settings is LFS)
    assert b"- tiny" in files["README.md"].content
    assert {"configuration_tiny.py", "modeling_tiny.py"} < set(server.repositories["user/custom"].files())
