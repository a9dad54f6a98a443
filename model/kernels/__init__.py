"""Fused operations, each behind one function beside its plain twin."""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp


def exact_products(dtype: jnp.dtype) -> AbstractContextManager[None]:
    """Within it a kernel's products of numbers of `dtype` are exact.

    Those of bfloat16 are so as they are, and kernels refuse to be asked for more.
    """
    return jax.default_matmul_precision("default" if dtype == jnp.bfloat16 else "highest")
