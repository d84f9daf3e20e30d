"""Suites: what candidates are scored on, found by name and identified by content; light: no torch, no lm_eval.

A suite is a YAML file and its data. Prompt suites (harmfulness, over_refusal) are ours:

    suite: demo_harmful
    kind: harmfulness
    data: demo_harmful.jsonl      # one {"prompt": "..."} per line, beside the YAML
    max_tokens: 32
    chat: true                    # the default: prompts go through the chat template
    template: prefix              # or another attack's name, or a text with {prompt} in it: what is asked
    rules: {refusal: [regex], compliance: [regex]}   # for the rule judge
    limit: 100                    # asks the 100 prompts whose content has the smallest hash; or a share, 0.1

A published set needs no YAML: its name in `evals.suites.published` loads it from the hub. With `reader: advbench`
instead of `kind`, `data` is a file as its authors publish it; without `data` the hub's is taken. `name+template` is the
suite `name` inside an attack template. The digest of a prompt suite covers its prompts and settings, wherever they came
from.

Task suites are files in lm-eval's format (they have `task:` or `group:`), or the name of a task, group or tag of
lm-eval. Their digest covers every file that decides a score, and no path.
"""

from evals.suites.load import BUNDLED_SUITES, load_suite
from evals.suites.suite import TEMPLATES, Rules, Suite, SuiteKind, TaskPart, read_prompts, read_requests

__all__ = [
    "BUNDLED_SUITES",
    "TEMPLATES",
    "Rules",
    "Suite",
    "SuiteKind",
    "TaskPart",
    "load_suite",
    "read_prompts",
    "read_requests",
]
