"""What kernel normalization costs: time and memory of layers and networks beside convolution and BatchNorm.

`cases` says what is measured (one module per benchmark), `measure` how, `rows` is the table that it is appended to,
`bars` and `plots` read that table.
"""
