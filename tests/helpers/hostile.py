"""Values at which a shell script stumbles that leaves out a quotation mark somewhere."""

VALUES = (
    *("a b", " a ", "it's", 'say "x"', "$(touch hacked)", "`touch hacked`", "${HOME}", "a\nb\n"),
    *("a\tb", "déjà 日本", "*", "[a-z]?", "~", "\\", "a;touch hacked", "a&b|c>d", "!x", "#", "-x"),
    *("--help", "{a,b}", "%s%q", "a\rb\x1b[2J", "=", ""),
)
