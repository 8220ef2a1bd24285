"""A program that stands for a training in the tests of sweeps."""

# A training that takes no time: its result is made of its bindings. Says in a common file that it ran.
PROGRAM = """
import json, os, sys, time
from pathlib import Path

def option(name):
    return [value for key, value in zip(sys.argv, sys.argv[1:]) if key == name]

folder, bindings = Path(option("--output")[0]), option("--set")
with open("ran.txt", "a") as file:
    file.write(" ".join(bindings) + "\\n")
if "x = 3" in bindings:
    sys.exit("program.py: Expected another x (got 3)\\n  while building Run")
if "x = 4" in bindings:
    os.kill(os.getpid(), 9)
if "x = 5" in bindings:
    raise RuntimeError("a defect")
time.sleep(float(os.environ.get("SECONDS", "0")))
score = sum(float(binding.split("=")[1]) for binding in bindings)
held_out = {"final": {"top1": score + 100}, "best": None}
(folder / "results.json").write_text(json.dumps({"final": {"top1": score}, "val": held_out, "seed": 0}))
(folder / "student.safetensors").write_text("weights")
"""
