"CPU seconds of a fresh process that checks a config, beside one that only starts Python, and one that imports torch: `python benchmarks/config.py`"
import resource, subprocess, sys, tempfile
from pathlib import Path
from tuneforge.options import AllOptions

CASES = {"python -c pass": "pass", "import pydantic": "import pydantic", "tuneforge --help": "import tuneforge.cli as c; c.main(['--help'])", "tuneforge config check, 10 keys": "import tuneforge.cli as c; c.main(['config', 'check', '{small}'])",
    "tuneforge config check, 200 keys": "import tuneforge.cli as c; c.main(['config', 'check', '{large}'])", "import torch": "import torch"}


def cpu(code):
    "CPU seconds of the best of five runs"
    used = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime+after.ru_stime-before.ru_utime-before.ru_stime)
    return min(used)


if __name__=="__main__":
    d = Path(tempfile.mkdtemp())
    small = "base_model: tiny:llama\ndatasets:\n  - {path: x.jsonl, type: alpaca}\nlearning_rate: 1e-4\nadapter: lora\nlora_r: 16\nlora_target_linear: true\nmicro_batch_size: 2\nsequence_len: 2048\nsample_packing: true\n"
    blank = [k for k, f in AllOptions.model_fields.items() if f.default is None and f"{k}:" not in small][:190]
    (d/"small.yml").write_text(small)
    (d/"large.yml").write_text(small+"".join(f"{k}:\n" for k in blank))
    base = None
    print(f"{'':<36}{'CPU s':>8}{'ratio':>8}")
    for name, code in CASES.items():
        t = cpu(code.replace("{small}", str(d/"small.yml")).replace("{large}", str(d/"large.yml")))
        base = base or t
        print(f"{name:<36}{t:>8.2f}{t/base:>8.1f}")
