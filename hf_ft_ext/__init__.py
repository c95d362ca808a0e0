"""hf_ft_ext: published fine-tuning methods as Hugging Face Trainers.

The public names stand in `__init__.pyi`. Each is imported when first used, so that `import hf_ft_ext` costs little.
"""

import lazy_loader

from hf_ft_ext.adapters.registration import register_on_import_of_peft
from hf_ft_ext.moved import serve_former_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_on_import_of_peft()  # so that `PeftModel.from_pretrained` knows our adapters
serve_former_names()
