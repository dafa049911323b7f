"""The doctor: what is wrong with a model before it is attacked, and what an evaluation or a training run would cost.

Example:
    >>> import torch
    >>> from instar.doctor import examine
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2), torch.nn.Softmax(dim=1))
    >>> report = examine(net, data=(torch.rand(20, 1, 2, 2), torch.arange(20) % 2), eps="8/255", suites=())
    >>> report.ok, report["output"].level
    (False, 'error')
"""

from instar.doctor.examination import examine, examine_machine
from instar.doctor.report import Check, Cost, Report, Training
from instar.doctor.training import predict

__all__ = ["Check", "Cost", "Report", "Training", "examine", "examine_machine", "predict"]
