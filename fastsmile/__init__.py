"""From a messy folder of faces to a smile classifier that can be trusted.

    from fastsmile import FitConfig, audit, fit, load_model, load_run
    audit('faces')
    run = fit('faces', FitConfig(arch='densenet161', epochs=5))
    run.predict('new faces', tta=True)

Names are loaded when they are first used, so that `fastsmile --help` imports neither torch nor pandas.

Import fastsmile before torch: OpenMP, which torch computes with, reads its settings when it is loaded. Its threads wait for each other by spinning;
where another program takes their core they spin for nothing, and beside another training a step takes twenty times as long. Here they spin shortly and
then sleep (benchmarks/README.md has the figures). Whoever set one of these variables keeps it.
"""
import os
from importlib import import_module

_WAITING = dict(GOMP_SPINCOUNT='2000', KMP_BLOCKTIME='1')  # of GNU's OpenMP, turns of the loop; of Intel's and LLVM's, milliseconds
if not os.environ.keys() & {*_WAITING, 'OMP_WAIT_POLICY'}: os.environ.update(_WAITING)
os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')  # ONNX Runtime would report to its maker, and keep an identifier in a folder
for _name, _level in dict(OPENCV_FFMPEG_LOGLEVEL='-8', OPENCV_LOG_LEVEL='ERROR').items(): os.environ.setdefault(_name, _level)  # we say why

_ROOMS = {
    'core.errors': ['SmileError', 'OptionError'],
    'config.fields': ['SourceOptions'],
    'config.fit': ['FitConfig'],
    'config.commands': ['AuditConfig', 'CalibrateConfig', 'CompareConfig', 'DemoConfig', 'EnsembleConfig', 'EvaluateConfig', 'ExplainConfig',
                        'ExportConfig', 'LRFindConfig', 'PredictConfig', 'ProbeConfig', 'PushConfig', 'ReportConfig', 'SampleConfig', 'ServeConfig',
                        'StudyConfig', 'TuneConfig'],
    'data.source': ['read_source'],
    'data.sample': ['sample'],
    'models.factory': ['list_archs'],
    'models.hub': ['push'],
    'inference.predict': ['load_model'],
    'inference.export': ['export'],
    'reports.audit': ['audit'],
    'serving.app': ['serve'],
    'runs.folder': ['Run', 'load_run'],
    'runs.fit': ['fit'],
    'runs.predict': ['predict'],
    'runs.evaluate': ['evaluate'],
    'runs.calibrate': ['calibrate'],
    'runs.report': ['report'],
    'runs.explain': ['explain'],
    'runs.compare': ['compare'],
    'runs.probe': ['probe'],
    'runs.tune': ['tune'],
    'runs.lr_find': ['lr_find'],
    'runs.ensemble': ['ensemble'],
    'runs.demo': ['demo'],
    'studies.run': ['study'],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = [*_ROOM_OF, '__version__']


def __getattr__(name: str):
    if name == '__version__':
        from importlib.metadata import version
        return version('fastsmile')
    if name not in _ROOM_OF: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'fastsmile.{_ROOM_OF[name]}'), name)


def __dir__(): return __all__
