"""docs/economics.md and its plots, out of the record that scripts/economics keeps."""


def write_page(record, docs):
    pass
