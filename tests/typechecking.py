"""How the types of annotated calls are checked (see pyproject.toml): an integer is a float too."""

import beartype as beartype_package

beartype = beartype_package.beartype(conf=beartype_package.BeartypeConf(is_pep484_tower=True))
