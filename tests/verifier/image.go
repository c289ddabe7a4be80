package main

import (
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// RowKey names a row.
type RowKey struct {
	Table Table
	Key   string
}

func (k RowKey) String() string { return k.Table.String() + " " + k.Key }

// digestRow is the ledger's digest of a row.
func digestRow(row []Column) string {
	fields := make([]string, len(row))
	for i, c := range row {
		fields[i] = c.Name
		if !c.Null {
			fields[i] += "=" + c.Value
		}
	}
	sum := md5.Sum([]byte(strings.Join(fields, "\x1f")))
	return hex.EncodeToString(sum[:])
}

// Image is what the tables are after the records applied so far.
type Image map[RowKey][]Column

// Apply applies the next record in commit order. It gives the full row after the change: values that the record leaves unsaid are
// those that the row had.
func (image Image) Apply(change *Change) ([]Column, error) {
	place := RowKey{change.Table, change.Key}
	switch change.Operation {
	case "T":
		maps.DeleteFunc(image, func(key RowKey, _ []Column) bool { return key.Table == change.Table })
		return nil, nil
	case "D":
		// The first half of a key change leaves the row for the second, which may need its values.
		if !change.KeyChanged {
			delete(image, place)
		}
		return nil, nil
	}
	from := place
	if change.KeyChanged {
		from.Key = change.OldKey
	}
	before := image[from]
	row := slices.Clone(change.After)
	for i, c := range row {
		if !c.Unsaid {
			continue
		}
		index := slices.IndexFunc(before, func(old Column) bool { return old.Name == c.Name })
		if index < 0 {
			return nil, fmt.Errorf("column %s is unsaid, and no record before says it", c.Name)
		}
		row[i] = before[index]
	}
	delete(image, from)
	if place.Key != "" {
		image[place] = row
	}
	return row, nil
}

// Reshape gives the rows of a table the columns that it has from now on: new ones are NULL in the rows that are there.
// A column that was renamed, and one with a default, cannot be told by that.
func (image Image) Reshape(table Table, columns []string) {
	for place, before := range image {
		if place.Table != table {
			continue
		}
		row := make([]Column, len(columns))
		for i, name := range columns {
			row[i] = Column{Name: name, Null: true}
			if index := slices.IndexFunc(before, func(old Column) bool { return old.Name == name }); index >= 0 {
				row[i] = before[index]
			}
		}
		image[place] = row
	}
}

// Digests gives the digest of each row.
func (image Image) Digests() map[RowKey]string {
	digests := make(map[RowKey]string, len(image))
	for key, row := range image {
		digests[key] = digestRow(row)
	}
	return digests
}

// digestAll is one digest of all rows.
func digestAll(digests map[RowKey]string) string {
	lines := make([]string, 0, len(digests))
	for key, digest := range digests {
		lines = append(lines, key.String()+" "+digest)
	}
	slices.Sort(lines)
	sum := md5.Sum([]byte(strings.Join(lines, "\n")))
	return hex.EncodeToString(sum[:])
}
