"""The package on disk: how it is read, checked, written and replaced. Lowest first:

fields        strict JSON, field by field; records that say what each of their fields should be
files         files that an interruption leaves old or new
wire          the protobuf wire format, and an audit of what a graph reaches for
onnx_graph    a graph as plain data: nodes, tensors, inputs, outputs
signatures    what the graphs of a package take and give
signs         which entries of a weight have to be >= 0 or <= 0
verdict       the record of a verdict on convexity
upgrade       manifests and histories of older versions
manifest      manifest.json
contents      the bytes of the other files, checked against it
folder        a package's folder: listing and reading it
replacement   a folder replaced by a new one
package       the whole, and the specification of the format
checkpoints   the history of a fine-tuning
"""
