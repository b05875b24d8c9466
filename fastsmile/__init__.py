"""From a messy folder of faces to a smile classifier that can be trusted.

    from fastsmile import FitConfig, audit, fit, load_model, load_run
    audit('faces')
    run = fit('faces', FitConfig(arch='densenet161', epochs=5))
    run.predict('new faces', tta=True)

Names are loaded when they are asked for, so that `fastsmile --help` waits neither for torch nor for pandas.
"""
from importlib import import_module

_HOMES = dict(SmileError='core', OptionError='core', SourceOptions='options', AuditConfig='options', FitConfig='options', PredictConfig='options',
              SampleConfig='options', DemoConfig='options', EvaluateConfig='options', CalibrateConfig='options', ExplainConfig='options',
              ReportConfig='options', ProbeConfig='options', EnsembleConfig='options', CompareConfig='options', ExportConfig='options',
              ServeConfig='options', StudyConfig='options',
              TuneConfig='options', read_source='table', audit='audit_page', fit='runs', probe='probe', ensemble='ensemble',
              tune='tune', export='export', serve='serve', study='study', load_run='runs', load_model='predict', Run='runs')
__all__ = [*_HOMES, '__version__']


def __getattr__(name):
    if name == '__version__':
        from importlib.metadata import version
        return version('fastsmile')
    if name not in _HOMES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'fastsmile.{_HOMES[name]}'), name)


def __dir__(): return __all__
