"""Installs jaxedit; the top-level `kernels` folder becomes `jaxedit.kernels`."""

import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parent

GGUF = ['gguf>=0.17']
DATA = ['datasets>=3.0']
TEXT = ['sacrebleu>=2.4', 'rouge-score>=0.1.2']
PLOT = ['matplotlib>=3.8']
TEST = [
    'torch==2.13.0',
    'chex>=0.1.90',
    'pytest>=8',
    'pytest-xdist>=3.5',
    'ruff>=0.9',
    'pyink',
    'setuptools>=64',
    *GGUF,
    *PLOT,
    *TEXT,
]


def packages() -> list[str]:
  """Lists the import packages, kernels under their installed name."""
  found = setuptools.find_packages(include=['jaxedit', 'jaxedit.*'])
  kernels = setuptools.find_packages(include=['kernels', 'kernels.*'])
  experiments = setuptools.find_packages(
      include=['experiments', 'experiments.*']
  )
  return found + [f'jaxedit.{name}' for name in kernels] + experiments


setuptools.setup(
    name='jaxedit',
    version='0.1.0',
    description='Knowledge editing for language models in JAX.',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    classifiers=[
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires='>=3.11',
    packages=packages(),
    package_dir={'jaxedit.kernels': 'kernels'},
    package_data={
        'jaxedit.eval.datasets': ['*.jsonl'],
        'jaxedit.stats': ['*.jsonl'],
        'jaxedit.trace': ['*.j2'],
        'experiments': ['flagfiles/*.flags'],
    },
    install_requires=[
        # jax 0.10.2 is the last for Python 3.11.
        'jax>=0.10.2,<0.13',
        'flax>=0.12.7',
        'optax>=0.2.5',
        'transformers>=4.56,<6',
        'numpy>=2.0',
        # 1.0 is announced with another interface.
        'orbax-checkpoint>=0.11.20,<1',
        'huggingface_hub>=0.34',
        'absl-py>=2.1',
        'safetensors>=0.5',
        'tokenizers>=0.22',
        'jinja2>=3.1',
        'tqdm>=4.66',
    ],
    extras_require={
        'gguf': GGUF,
        'plot': PLOT,
        'data': DATA,
        'text': TEXT,
        'demo': [*GGUF, *TEXT],
        # By which processes find each other on Kubernetes.
        'k8s': ['kubernetes>=29'],
        'test': TEST,
    },
)
