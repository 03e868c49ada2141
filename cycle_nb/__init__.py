"Cycle encoding of a StyleGAN encoder. The names below load when they are first used; the rest lies in the modules."
from importlib import import_module as _load

__version__ = "0.1.0"

_HOMES = dict(invert='inversion', Inversion='inversion', load_bundle='bundle', load_generator='checkpoints',
              load_encoder='encoder_checkpoints', Explorer='explore')
__all__ = ['__version__', *_HOMES]


def __getattr__(name):
    "A public name, from the module that defines it (PEP 562)."
    if name not in _HOMES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    globals()[name] = value = getattr(_load(f'.{_HOMES[name]}', __name__), name)
    return value


def __dir__():
    "What is there, and what would be loaded."
    return sorted({*globals(), *__all__})
