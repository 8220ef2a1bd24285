"""Which edges? A sweep over three edge classes, two seeds each, on handwritten digits: the gin file, the command, the table.

pip install 'gkd[sweep]'
python examples/ablation.py
"""

import tempfile
from pathlib import Path

from gkd.cli import main

ABLATION = """
Sweep.base = 'gin/quickstart_classification.gin'
Sweep.teacher = 'gin/classification/digits_teacher.gin'
Sweep.teacher_weights = 'teacher/student.safetensors'
Sweep.bindings = ('EPOCHS = 1', 'Trainer.loggers = ()')
Sweep.reports = False
Sweep.seeds = (0, 1)
Sweep.references = {'KD': 'gin/methods/kd.gin'}
Sweep.baseline = 'KD'
Sweep.axes = {
    'edges': {
        'kNN': (),
        'complete': 'GraphBuilder.edges = @CompleteEdges()',
        'attention': 'GraphBuilder.edges = @AttentionEdges()',
    },
}
"""

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "edges.gin"
    file.write_text(ABLATION.replace("'teacher/", f"'{folder}/teacher/"))
    code = main(["sweep", "--gin", str(file), "--output", f"{folder}/sweep"])
    print((Path(folder) / "sweep" / "table.md").read_text())
raise SystemExit(code)
