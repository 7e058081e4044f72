"""The parts of a compressed weight, one file each; the folder is the list of their kinds.

    W  ~  base.dense() + outliers.dense() + adapter.dense()

`dense()` is the float32 matrix `[out, in]` that a part stands for. Kernels, files and tests are checked against that matrix. A
part's file holds everything that is specific to it, behind two contracts:

    Part     the values: dense(), tensors(), describe(), summary(), trainable(), kernel_operands()
    Entry    what config.json says of it, which is known before the part exists: expected(), stored_bits(), check(),
             from_stored(), summary(), kernel_layout()

    base.py           the two contracts, and the kinds of this folder
    elementwise.py    parts with one element (value, code or index) per weight: a mask can lie over them
    kernel_layout.py  what kernels need to know of a part
    trainable.py      a part while it is tuned
    fields.py         reading the fields of an entry
    pack.py           a layer's parts by slot, the names of their tensors, the layer's entry
"""
