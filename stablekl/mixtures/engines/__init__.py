"""The integration engines, one topic a file: tensors in, a value and its error out; they know no distribution."""
