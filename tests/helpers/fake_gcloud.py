"""A `gcloud` that knows queued resources and TPU VMs: tests/project/test_tpu_vm.py puts it on PATH.

Its world is the folder of the environment variable FAKE_GCLOUD:

    calls.jsonl       the arguments of every call
    world.json        "resource": the queued resource or null; "node": the TPU VM or null; "states":
                      what a new resource goes through, one at each look; "hosts": how many a TPU
                      has; "plays": what goes wrong, see `play`
    hosts/GENERATION/WORKER
                      the home of each host. Commands run there for real, with fake_host.sh's `uv`.

Flags are those of the reference of Google Cloud's SDK; any other is refused, as gcloud does.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

FOLDER = pathlib.Path(os.environ.get("FAKE_GCLOUD", ""))
WORLD = FOLDER / "world.json"

# https://cloud.google.com/sdk/gcloud/reference/compute/tpus (the GA commands)
OF_ALL = {"project", "zone", "quiet", "format"}
FLAGS = {
    "queued-resources create": {
        *("accelerator-type", "async", "boot-disk", "data-disk", "description", "guaranteed"),
        *("internal-ips", "labels", "metadata", "metadata-from-file", "network", "node-count"),
        *("node-id", "node-prefix", "range", "reserved", "runtime-version", "scopes"),
        *("service-account", "shielded-secure-boot", "spot", "subnetwork", "tags", "topology"),
        *("type", "valid-after-duration", "valid-after-time", "valid-until-duration"),
        *("valid-until-time", "reservation-host-project"),
    },
    "queued-resources delete": {"async", "force"},
    "queued-resources list": {"filter", "limit", "page-size", "sort-by", "uri"},
    "tpu-vm list": {"filter", "limit", "page-size", "sort-by", "uri"},
    "tpu-vm ssh": {
        *("dry-run", "force-key-file-overwrite", "internal-ip", "plain", "ssh-flag"),
        *("ssh-key-file", "strict-host-key-checking", "worker", "command", "output-directory"),
        *("ssh-key-expiration", "ssh-key-expire-after"),
    },
    "tpu-vm scp": {
        *("compress", "dry-run", "force-key-file-overwrite", "internal-ip", "plain", "recurse"),
        *("scp-flag", "ssh-key-file", "strict-host-key-checking", "worker"),
        *("ssh-key-expiration", "ssh-key-expire-after"),
    },
}


def fail(message: str, status: int = 1):
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(status)


def parse(arguments, allowed):
    flags, positional = {}, []
    for argument in arguments:
        if not argument.startswith("--"):
            positional.append(argument)
            continue
        name, _, value = argument.removeprefix("--").partition("=")
        if name not in allowed | OF_ALL:
            fail(f"unrecognized arguments: {argument}", 2)
        flags[name] = value
    for needed in ("project", "zone"):
        if not flags.get(needed):
            fail(f"--{needed} was not given", 2)
    return flags, positional


def lookup(item, key):
    """The value of a key of `--format`, such as "tpu.nodeSpec[0].node.labels.mine"."""
    if key.endswith(".len()"):
        return len(lookup(item, key.removesuffix(".len()")) or ()) or ""
    for part in re.findall(r"\w+", key):
        if item in (None, ""):
            return ""
        if isinstance(item, list):
            item = item[int(part)] if int(part) < len(item) else None
        else:
            item = item.get(part)
    return "" if item is None else item


def print_list(items, flags):
    pattern = re.fullmatch(r"name~'(.*)'", flags["filter"])[1]
    separator, keys = re.fullmatch(r"value\[separator='(.)'\]\((.*)\)", flags["format"]).groups()
    for item in items:
        if item and re.search(pattern, item["name"]):
            print(separator.join(str(lookup(item, key)) for key in keys.split(",")))


def name_of(flags, kind, name):
    return f"projects/{flags['project']}/locations/{flags['zone']}/{kind}/{name}"


def homes(world):
    return FOLDER / "hosts" / str(world["generation"])


def processes_of(home):
    """Ids of the processes whose HOME is a folder or in it, and their command lines."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            is_here = any(
                f"{v.decode(errors='replace')}/".startswith(f"HOME={home}/") for v in variables
            )
            if state != "Z" and is_here:
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
        except OSError:
            continue
    return found


def end_processes(home):
    """A machine that is taken away takes all that runs on it along."""
    while found := processes_of(home):
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def take_node(world):
    end_processes(homes(world))
    world["gone"] = world["node"] or world.get("gone")
    world["node"] = None


def play(world, command, text):
    """What is to go wrong with this call, if anything; each play is used up.

    A play is {"at": a command or a part of the remote command, "do": ...}: "refuse" fails with
    "message", on a host "worker" or on all; "preempt" takes the TPU away; "vanish" deletes the
    resource, as somebody else would; "terminate" sends SIGTERM to the restart loops; "fail" lets
    the request fail; "repair" empties the host "worker"; "reboot" ends what runs there, and the
    programs of the others, which lost it; "hide" lists nothing, as a list that is late; "linger"
    deletes the resource and shows its TPU twice more; "call" runs somebody's "command" before this
    one. "skip" lets so many such calls pass first.
    """
    for number, each in enumerate(world["plays"]):
        if each["at"] != command and each["at"] not in text:
            continue
        if each.get("skip"):
            each["skip"] -= 1
            return None
        del world["plays"][number]
        return each
    return None


def in_host(world, worker, command):
    home = homes(world) / str(worker)
    environment = {
        "HOME": str(home),
        "HOSTNAME": f"host-{worker}",
        "PATH": f"{FOLDER / 'bin'}:/usr/bin:/bin",
        "WORLD": str(FOLDER),
        "GENERATION": str(world["generation"]),
    }
    return subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode


def ssh(world, flags, positional):
    if world["node"] is None or world["node"]["state"] != "READY":
        fail(f"TPU {positional[0]} is not READY")
    command = flags["command"]
    if not sys.stdin.isatty():
        sys.stdin.read()  # as ssh does
    hosts = range(len(world["node"]["networkEndpoints"]))
    workers = hosts if flags["worker"] == "all" else [int(flags["worker"])]
    planned = play(world, None, command)
    save(world)
    statuses = []
    for worker in workers:
        if planned and planned["do"] == "refuse" and planned.get("worker", worker) == worker:
            print(f"ssh: worker {worker}: Connection timed out", file=sys.stderr)
            statuses.append(255)
        elif planned and planned["do"] != "refuse":
            if planned["at"] == "follow":
                wait_for_start(world)
            happen(world, planned)
            save(world)
            statuses.append(255 if planned["do"] in ("preempt", "vanish") else None)
            if statuses[-1] is None:
                statuses[-1] = in_host(world, worker, command)
        else:
            statuses.append(in_host(world, worker, command))
    sys.exit(next((status for status in statuses if status), 0))


def wait_for_start(world):
    for _ in range(4800):
        if all((home / "ran").exists() for home in homes(world).iterdir()):
            return
        subprocess.run(["sleep", "0.05"])


def happen(world, planned):
    if planned["do"] == "preempt":
        take_node(world)
        world["resource"]["state"] = {"state": "SUSPENDED"}
        world["states"] = world["later_states"]
    elif planned["do"] == "vanish":
        take_node(world)
        world["resource"] = None
    elif planned["do"] == "fail":
        take_node(world)
        world["resource"] |= {"state": {"state": "FAILED"}, "coming": []}
    elif planned["do"] == "repair":
        home = homes(world) / str(planned["worker"])
        end_processes(home)
        shutil.rmtree(home)
        home.mkdir()
    elif planned["do"] == "reboot":
        end_processes(homes(world) / str(planned["worker"]))
        for process, command in processes_of(homes(world)).items():
            if command.startswith("bash\0.venv/bin/python\0"):
                os.kill(process, signal.SIGKILL)
    elif planned["do"] == "terminate":
        for process, command in processes_of(homes(world)).items():
            if command.startswith("bash\0launch/restart_loop.sh"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)


def save(world):
    WORLD.write_text(json.dumps(world, indent=1))


def main(arguments):
    with (FOLDER / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    world = json.loads(WORLD.read_text())
    if arguments[:2] == ["storage", "ls"]:
        bucket, _, prefix = arguments[2].removeprefix("gs://").partition("/")
        if bucket != "mine":
            fail(f"{arguments[2]} not found: 404.")
        if prefix:  # the bucket is empty
            fail("One or more URLs matched no objects.")
        return
    if arguments[:2] != ["compute", "tpus"]:
        fail(f"Invalid choice: {arguments[0]!r}.", 2)
    command = " ".join(arguments[2:4])
    if command not in FLAGS:
        fail(f"Invalid choice: {command!r}.", 2)
    flags, positional = parse(arguments[4:], FLAGS[command])
    if command == "tpu-vm ssh":
        ssh(world, flags, positional)
    planned = play(world, command, "")
    save(world)
    if planned and planned["do"] == "refuse":
        fail(planned["message"])
    if planned and planned["do"] == "hide":
        return
    if planned and planned["do"] == "call":
        subprocess.run(planned["command"], stdout=sys.stderr)
        world = json.loads(WORLD.read_text())
    elif planned:
        happen(world, planned)
        save(world)

    if command == "queued-resources list":
        resource = world["resource"]
        if resource and resource["coming"]:
            resource["state"] = resource["coming"].pop(0)
            if resource["state"].get("state") == "ACTIVE":
                world["generation"] += 1
                for worker in range(world["hosts"]):
                    (homes(world) / str(worker)).mkdir(parents=True)
                world["node"] = {
                    "name": name_of(flags, "nodes", resource["tpu"]["nodeSpec"][0]["nodeId"]),
                    "state": "READY",
                    "health": "HEALTHY",
                    "networkEndpoints": [{"port": 8470}] * world["hosts"],
                    "labels": resource["tpu"]["nodeSpec"][0]["node"]["labels"],
                }
        save(world)
        print_list([resource], flags)
    elif command == "tpu-vm list":
        print_list([world["node"]], flags)
        if world["node"] and "left" in world["node"]:
            world["node"]["left"] -= 1
            if not world["node"]["left"]:
                world["node"] = None
        save(world)
    elif command == "queued-resources create":
        for needed in ("accelerator-type", "runtime-version", "node-id"):
            if not flags.get(needed):
                fail(f"argument --{needed}: Must be specified.", 2)
        if world["resource"]:
            fail(f"ALREADY_EXISTS: {positional[0]}")
        labels = dict(pair.split("=") for pair in flags.get("labels", "").split(",") if pair)
        world["resource"] = {
            "name": name_of(flags, "queuedResources", positional[0]),
            "state": {"state": "CREATING"},
            "tpu": {"nodeSpec": [{"nodeId": flags["node-id"], "node": {"labels": labels}}]},
            "coming": list(world["states"]),
        }
        save(world)
    elif command == "queued-resources delete":
        resource = world["resource"]
        if not resource:
            fail(f"NOT_FOUND: {positional[0]}")
        if world["node"] and "force" not in flags:
            fail("FAILED_PRECONDITION: the queued resource has a TPU: --force")
        node = world["node"]
        take_node(world)
        if planned and planned["do"] == "linger":
            world["node"] = (node or world["gone"]) | {"state": "DELETING", "left": 2}
        world["resource"] = None
        save(world)
    elif command == "tpu-vm scp":
        if world["node"] is None or flags["worker"] != "all":
            fail("no such TPU")
        save(world)
        *sources, target = positional
        if target != f"{world['node']['name'].rpartition('/')[2]}:":
            fail(f"no such target: {target}")
        for home in homes(world).iterdir():
            for source in sources:
                shutil.copy(source, home)


if __name__ == "__main__":
    main(sys.argv[1:])
