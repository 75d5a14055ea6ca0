"""Holds the stand-in for the Hub, and `gptq` against it, to what the Hub's own Python client does.

    pip install huggingface_hub==2.4.0
    cargo build -p gptq-cli --bins --examples
    python tests/interop/hub_client.py --target ../../target/debug

The client uploads and downloads by way of the stand-in, with Xet and without: if the stand-in were
not as the Hub is, the client would not do with it. Then each of the two, `gptq` and the client, takes
what the other has pushed, and reads the cache that the other has filled, without a network too.
Everything stays on 127.0.0.1.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

CHECKS = []


def check(name, right):
    CHECKS.append((name, bool(right)))
    print(f"{'ok   ' if right else 'WRONG'} {name}", flush=True)


def write_model(folder, seed):
    """A folder that looks as a model, weights in random bytes."""
    numbers = random.Random(seed)
    shards = {f"model-0000{i}-of-00002.safetensors": numbers.randbytes(size) for i, size in ((1, 230_000), (2, 5_000))}
    files = {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {f"tensor{i}": name for i, name in enumerate(shards)}}
        ).encode(),
        "README.md": "# Über uns\n".encode(),
        "LICENSE/LICENSE 1.txt": b"free\n",
        "empty.txt": b"",
        **shards,
    }
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    return files


def contents(folder):
    paths = [p for p in Path(folder).rglob("*") if p.is_file() and ".cache" not in p.parts]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def without_attributes(files):
    return {name: bytes_ for name, bytes_ in files.items() if name != ".gitattributes"}


def client(way, work):
    """What the client does by itself, in a process of its own, as it reads its variables once."""
    import huggingface_hub as hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api, repo = hub.HfApi(), f"me/by-{way}"
    files = write_model(work / f"client-{way}", way)
    api.create_repo(repo, private=True)
    if way == "xet":
        # One by one: the stand-in takes a block of Xet's storage for one file.
        for name in files:
            api.upload_file(repo_id=repo, path_in_repo=name, path_or_fileobj=work / f"client-{way}" / name)
    else:
        api.upload_folder(repo_id=repo, folder_path=work / f"client-{way}")
    listed = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True) if hasattr(entry, "size")}
    check(f"{way}: all files are listed", set(listed) - {".gitattributes"} == set(files))
    large = {name for name, entry in listed.items() if entry.lfs}
    check(f"{way}: large files are those of the storage", large == {n for n in files if n.endswith(".safetensors")})
    api.create_branch(repo, branch="other", revision=api.list_repo_commits(repo)[-1].commit_id)
    other = [entry.path for entry in api.list_repo_tree(repo, recursive=True, revision="other") if hasattr(entry, "size")]
    check(f"{way}: a branch from the first commit is empty", other == [".gitattributes"])
    folder = hub.snapshot_download(repo)
    check(f"{way}: what is downloaded is what was uploaded", without_attributes(contents(folder)) == files)
    for failing, error in ((("me/none",), RepositoryNotFoundError), ((repo, "v2"), RevisionNotFoundError)):
        try:
            api.model_info(failing[0], revision=failing[-1] if len(failing) > 1 else None)
            check(f"{way}: {failing} is not there", False)
        except error:
            check(f"{way}: {failing} is not there", True)


def offline(repo):
    """Whether the client, without a network, finds a whole model in the cache."""
    import huggingface_hub as hub
    from huggingface_hub.errors import IncompleteSnapshotError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check("the client's look at the cache has no warnings", not hub.scan_cache_dir().warnings)
    try:
        print(json.dumps(without_attributes({n: len(b) for n, b in contents(hub.snapshot_download(repo)).items()})))
    except IncompleteSnapshotError:
        print("incomplete")


def run(args, env, expect=0):
    done = subprocess.run(args, env=env, capture_output=True, text=True)
    if done.returncode != expect:
        sys.exit(f"{args} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def both(gptq, work, env):
    """Each takes what the other made."""
    me = [sys.executable, __file__]
    cache = {**env, "HF_HOME": str(work / "shared")}
    repo = "me/by-http"
    run([gptq, "plan", repo], cache, expect=1)  # The configuration is that of no model.
    said = run([*me, "--offline", repo], {**cache, "HF_HUB_OFFLINE": "1"})
    check("after a part the client knows what is missing", said.strip().endswith("incomplete"))
    folder = Path(run([gptq, "fetch", repo], cache).strip())
    expected = contents(work / "client-http")
    check("gptq fetches what the client uploaded", contents(folder) == {n: b for n, b in expected.items()})
    run([*me, "--download", repo], cache)
    said = run([*me, "--offline", repo], {**cache, "HF_HUB_OFFLINE": "1"})
    check("the client finds the cache of both whole", '"config.json"' in said)
    theirs = {**env, "HF_HOME": str(work / "theirs")}
    run([*me, "--download", repo], theirs)
    run([gptq, "fetch", repo, "--verify"], {**theirs, "HF_HUB_OFFLINE": "1"})
    check("gptq finds the client's cache whole without a network", True)
    lists = [next((work / place / "hub/models--me--by-http/trees").iterdir()) for place in ("shared", "theirs")]
    check("both keep the same list of files", lists[0].read_bytes() == lists[1].read_bytes())

    files = write_model(work / "ours", "ours")
    run([gptq, "push", work / "ours", "--repo", "me/ours", "--private"], env)
    folder = run([*me, "--download", "me/ours"], {**env, "HF_HOME": str(work / "pushed")}).strip()
    check("the client downloads what gptq pushed", without_attributes(contents(folder)) == files)
    again = json.loads(run([gptq, "push", work / "ours", "--repo", "me/ours", "--json"], env))
    check("a second push sends nothing", again["uploaded_files"] == 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", type=Path, help="folder of gptq and examples/hub_stand_in")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--offline", help=argparse.SUPPRESS)
    parser.add_argument("--download", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.download:
        import huggingface_hub

        return print(huggingface_hub.snapshot_download(args.download))
    if args.offline:
        offline(args.offline)
        return sys.exit(not all(right for _, right in CHECKS))
    if args.client:
        client(args.client, args.work)
        return sys.exit(not all(right for _, right in CHECKS))
    target = args.target.resolve()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        hub = subprocess.Popen([target / "examples/hub_stand_in"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        address, token = hub.stdout.readline().split()
        env = {"PATH": os.environ["PATH"], "HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        try:
            for way in ("xet", "http"):
                own = {**env, "HF_HOME": str(work / f"home-{way}"), "HF_HUB_DISABLE_XET": str(int(way == "http"))}
                done = subprocess.run([sys.executable, __file__, "--client", way, "--work", work], env=own)
                check(f"{way}: the client did all that was asked", done.returncode == 0)
            both(target / "gptq", work, env)
        finally:
            hub.stdin.close()
            hub.wait()
    wrong = [name for name, right in CHECKS if not right]
    print(f"{len(CHECKS) - len(wrong)} right, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
