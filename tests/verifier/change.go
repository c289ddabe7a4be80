package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

// Change is a decoded ChangeRecord.
type Change struct {
	Coordinate  Coordinate
	Transaction uint32
	Operation   string // I, U, D or T, as in the ledger
	Table       Table
	// Key is the key that the record is filed under; empty if there is none.
	Key string
	// OldKey is the key before an update that changed it.
	OldKey string
	// After is the row after the change, nil for D and T.
	After        []Column
	CommitMicros int64
	KeyChanged   bool
	// SchemaVersion is that of the table's schema; OldSchemaVersion is the one before, where this record says that it is another.
	SchemaVersion, OldSchemaVersion uint32
	// Columns are those of the table from here on, where this record says that its schema is another.
	Columns []string
	// Dropped: this record says that the table, or one that had its name, was dropped.
	Dropped bool
}

// Table is a table's name.
type Table struct{ Schema, Name string }

func (t Table) String() string { return t.Schema + "." + t.Name }

// Column is a column's value as PostgreSQL writes it.
type Column struct {
	Name  string
	Value string
	Null  bool
	// Unsaid: the value is what it was before.
	Unsaid bool
	// Oversized: the value was left out for its size.
	Oversized bool
}

// Decoder decodes ChangeRecords by their .proto file.
type Decoder struct {
	record protoreflect.MessageDescriptor
}

// NewDecoder compiles the file that lies under this folder.
func NewDecoder(ctx context.Context, folder string) (*Decoder, error) {
	compiler := protocompile.Compiler{Resolver: &protocompile.SourceResolver{ImportPaths: []string{folder}}}
	files, err := compiler.Compile(ctx, "meander/v1/change.proto")
	if err != nil {
		return nil, fmt.Errorf("cannot compile the .proto files in %s: %w", folder, err)
	}
	record := files[0].Messages().ByName("ChangeRecord")
	if record == nil {
		return nil, fmt.Errorf("%s holds no message ChangeRecord", files[0].Path())
	}
	return &Decoder{record}, nil
}

// R is a row of a snapshot, B and E are where a snapshot begins and ends, S is another schema.
var operations = map[protoreflect.EnumNumber]string{1: "I", 2: "U", 3: "D", 4: "T", 5: "R", 7: "B", 8: "E", 9: "S"}

// Decode reads the value of a record.
func (d *Decoder) Decode(value []byte) (*Change, error) {
	record := dynamicpb.NewMessage(d.record)
	if err := proto.Unmarshal(value, record); err != nil {
		return nil, err
	}
	coordinate := message(record, "coordinate")
	relation := message(record, "relation")
	columns := field(relation, "columns").List()
	change := &Change{
		Coordinate: Coordinate{
			Epoch:   uint32(field(coordinate, "epoch").Uint()),
			LSN:     field(coordinate, "commit_lsn").Uint(),
			Ordinal: field(coordinate, "ordinal").Uint(),
			Part:    uint32(field(coordinate, "part").Uint()),
		},
		Transaction:  uint32(field(record, "transaction_id").Uint()),
		Operation:    operations[field(record, "operation").Enum()],
		Table:        Table{field(relation, "schema").String(), field(relation, "table").String()},
		CommitMicros: field(record, "commit_time_micros").Int(),
		KeyChanged:   field(record, "key_changed").Bool(),

		SchemaVersion:    uint32(field(record, "schema_version").Uint()),
		OldSchemaVersion: uint32(field(message(message(record, "schema_change"), "before"), "version").Uint()),
	}
	schemas := message(record, "schema_change")
	change.Dropped = schemas.IsValid() && !schemas.Has(schemas.Descriptor().Fields().ByName("after"))
	if change.Operation == "S" {
		after := field(message(message(schemas, "after"), "relation"), "columns").List()
		for i := range after.Len() {
			change.Columns = append(change.Columns, field(after.Get(i).Message(), "name").String())
		}
	}
	if change.Operation == "" {
		return nil, fmt.Errorf("the value has no operation")
	}
	before, err := row(record, "before", columns)
	if err != nil {
		return nil, err
	}
	if change.After, err = row(record, "after", columns); err != nil {
		return nil, err
	}
	for _, c := range change.After {
		if c.Oversized {
			return nil, fmt.Errorf("the value of column %s was left out for its size: nobody can tell from the log what it is", c.Name)
		}
	}
	switch change.Operation {
	case "I", "U", "R":
		change.Key = key(columns, change.After)
		if change.KeyChanged {
			change.OldKey = key(columns, before)
		}
	case "D":
		change.Key = key(columns, before)
	}
	return change, nil
}

// InLedger says that the ledger knows of it: not of what was read beside the changes, nor of schemas.
func (c *Change) InLedger() bool { return strings.Contains("IUDT", c.Operation) }

func field(m protoreflect.Message, name protoreflect.Name) protoreflect.Value {
	return m.Get(m.Descriptor().Fields().ByName(name))
}

func message(m protoreflect.Message, name protoreflect.Name) protoreflect.Message {
	return field(m, name).Message()
}

func row(record protoreflect.Message, name protoreflect.Name, columns protoreflect.List) ([]Column, error) {
	if !record.Has(record.Descriptor().Fields().ByName(name)) {
		return nil, nil
	}
	values := field(message(record, name), "values").List()
	if values.Len() != columns.Len() {
		return nil, fmt.Errorf("%s has %d values for %d columns", name, values.Len(), columns.Len())
	}
	row := make([]Column, columns.Len())
	for i := range row {
		row[i] = column(field(columns.Get(i).Message(), "name").String(), values.Get(i).Message())
	}
	return row, nil
}

func column(name string, value protoreflect.Message) Column {
	c := Column{Name: name}
	kind := value.WhichOneof(value.Descriptor().Oneofs().ByName("kind"))
	if kind == nil {
		c.Null = true
		return c
	}
	v := value.Get(kind)
	switch kind.Name() {
	case "integer":
		c.Value = strconv.FormatInt(v.Int(), 10)
	case "boolean":
		c.Value = strconv.FormatBool(v.Bool())[:1]
	case "float4":
		c.Value = formatFloat(v.Float(), 32)
	case "float8":
		c.Value = formatFloat(v.Float(), 64)
	case "binary":
		c.Value = `\x` + hex.EncodeToString(v.Bytes())
	case "text":
		c.Value = v.String()
	case "absent":
		c.Oversized = v.Enum() == 3
		c.Unsaid = !c.Oversized
	}
	return c
}

// formatFloat writes a number as PostgreSQL does: the shortest digits that read back the same, with an exponent where there would
// otherwise be many zeros.
func formatFloat(f float64, bits int) string {
	switch {
	case math.IsNaN(f):
		return "NaN"
	case math.IsInf(f, 1):
		return "Infinity"
	case math.IsInf(f, -1):
		return "-Infinity"
	case f == 0:
		return strconv.FormatFloat(f, 'f', -1, bits)
	}
	scientific := strconv.FormatFloat(f, 'e', -1, bits)
	_, digits, _ := strings.Cut(scientific, "e")
	exponent, _ := strconv.Atoi(digits)
	most := 15
	if bits == 32 {
		most = 6
	}
	if exponent < -4 || exponent >= most {
		return scientific
	}
	return strconv.FormatFloat(f, 'f', -1, bits)
}

// key gives the key columns as a JSON object of their text forms, or nothing if there are none.
func key(columns protoreflect.List, row []Column) string {
	var fields []string
	for i, c := range row {
		if field(columns.Get(i).Message(), "key").Bool() {
			fields = append(fields, jsonString(c.Name)+":"+jsonString(c.Value))
		}
	}
	if len(fields) == 0 {
		return ""
	}
	return "{" + strings.Join(fields, ",") + "}"
}

// jsonString escapes what JSON asks for and nothing else; encoding/json escapes more.
func jsonString(text string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range text {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < 0x20:
			if i := strings.IndexRune("\b\f\n\r\t", r); i >= 0 {
				b.WriteByte('\\')
				b.WriteByte("bfnrt"[i])
			} else {
				fmt.Fprintf(&b, `\u%04x`, r)
			}
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}
