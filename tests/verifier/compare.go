package main

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Entry is one change as the ledger has it.
type Entry struct {
	Table     Table
	Operation string
	Key       string
	// OldKey is set if the change was to the key.
	OldKey string
	Digest string
}

// EntryID says which change it is: of which transaction, and which one of it.
type EntryID struct {
	Transaction uint32
	Index       uint64
}

// Ledger is what PostgreSQL says.
type Ledger struct {
	Entries map[EntryID]Entry
	// Rows has the digest of each row of the ledger's tables.
	Rows map[RowKey]string
}

// Tables are the tables that the ledger speaks of.
func (l *Ledger) Tables() []Table {
	tables := map[Table]bool{}
	for _, entry := range l.Entries {
		tables[entry.Table] = true
	}
	return slices.SortedFunc(maps.Keys(tables), func(a, b Table) int { return strings.Compare(a.String(), b.String()) })
}

// RecordCount is how many records the ledger's changes make.
func (l *Ledger) RecordCount() int {
	count := 0
	for _, entry := range l.Entries {
		count += len(expected(entry))
	}
	return count
}

// keys are the keys that the ledger's changes touched. Other rows were there before the ledger began.
func (l *Ledger) keys() map[RowKey]bool {
	keys := map[RowKey]bool{}
	for _, entry := range l.Entries {
		for _, key := range []string{entry.Key, entry.OldKey} {
			if key != "" {
				keys[RowKey{entry.Table, key}] = true
			}
		}
	}
	return keys
}

// part is one of the records that one change makes.
type part struct {
	operation, key, digest string
}

// expected are the records of a change: one, but for a change of the key.
func expected(entry Entry) []part {
	if entry.OldKey != "" {
		return []part{{"D", entry.OldKey, ""}, {"U", entry.Key, entry.Digest}}
	}
	return []part{{entry.Operation, entry.Key, entry.Digest}}
}

// Record is one record as a sink holds it.
type Record struct {
	// Place says where it lies, for people.
	Place string
	// Lane is the partition or stream: in it, records are in commit order.
	Lane string
	// Coordinate is what the sink says outside of the value.
	Coordinate Coordinate
	Key        string
	Value      []byte
	// Millis is Kafka's timestamp; 0 in Redis.
	Millis int64
	Change *Change
}

// Differences counts all and keeps the first.
type Differences struct {
	Count int
	First []string
}

const shown = 10

func (d *Differences) add(format string, arguments ...any) {
	d.Count++
	if len(d.First) < shown {
		d.First = append(d.First, fmt.Sprintf(format, arguments...))
	}
}

// Totals is one column of the report.
type Totals struct {
	Changes   int `json:"changes"`
	Inserts   int `json:"inserts"`
	Updates   int `json:"updates"`
	Deletes   int `json:"deletes"`
	Truncates int `json:"truncates"`
	// Schemas is how many records say that a table has another schema. The ledger does not know them.
	Schemas int    `json:"schemas"`
	Keys    int    `json:"keys"`
	Digest  string `json:"digest"`
}

func (t *Totals) count(operation string) {
	t.Changes++
	switch operation {
	case "I":
		t.Inserts++
	case "U":
		t.Updates++
	case "D":
		t.Deletes++
	case "T":
		t.Truncates++
	}
}

// LedgerTotals counts what PostgreSQL says.
func LedgerTotals(ledger *Ledger) Totals {
	var totals Totals
	for _, entry := range ledger.Entries {
		totals.count(entry.Operation)
	}
	rows := only(ledger.Rows, ledger.keys())
	totals.Keys, totals.Digest = len(rows), digestAll(rows)
	return totals
}

func only(rows map[RowKey]string, keys map[RowKey]bool) map[RowKey]string {
	rows = maps.Clone(rows)
	maps.DeleteFunc(rows, func(key RowKey, _ string) bool { return !keys[key] })
	return rows
}

// CompareSink holds what a sink has, lane by lane in the sink's own order, against the ledger.
func CompareSink(ledger *Ledger, records []Record, differences *Differences) Totals {
	checkLanes(records, differences)

	records = slices.Clone(records)
	slices.SortStableFunc(records, func(a, b Record) int { return a.Coordinate.Compare(b.Coordinate) })
	var totals Totals
	image := Image{}
	found := map[EntryID]int{}
	commits := newCommits()
	schemas := schemas{}
	for i, record := range records {
		if i > 0 && record.Coordinate == records[i-1].Coordinate {
			differences.add("duplicate: %s is at %s and at %s", record.Coordinate, records[i-1].Place, record.Place)
			continue
		}
		change := record.Change
		if change.Coordinate != record.Coordinate {
			differences.add("%s: filed as %s, but its value says %s", record.Place, record.Coordinate, change.Coordinate)
		}
		if change.Key != record.Key {
			differences.add("%s (%s): filed under the key %q, but its value says %q", record.Place, record.Coordinate, record.Key, change.Key)
		}
		schemas.check(record, differences)
		switch {
		case change.Operation == "S":
			totals.Schemas++
			if !change.Dropped {
				image.Reshape(change.Table, change.Columns)
			}
			continue
		case !change.InLedger():
			checkSnapshot(image, record, differences)
			continue
		}
		commits.check(record, differences)
		row, err := image.Apply(change)
		if err != nil {
			differences.add("%s (%s): %v", record.Place, record.Coordinate, err)
		}
		id := EntryID{change.Transaction, change.Coordinate.Ordinal}
		entry, known := ledger.Entries[id]
		if !known {
			totals.count(change.Operation)
			differences.add("not in the ledger: %s %s %s of transaction %d at %s", change.Operation, change.Table, record.Coordinate, change.Transaction, record.Place)
			continue
		}
		if found[id] == 0 {
			totals.count(entry.Operation)
		}
		found[id]++
		compareRecord(entry, record, schemas.partOf(record), row, differences)
	}
	for id, entry := range ledger.Entries {
		if parts := expected(entry); found[id] != len(parts) {
			differences.add("missing: transaction %d change %d (%s %s %s) has %d of %d records",
				id.Transaction, id.Index, entry.Operation, entry.Table, entry.Key, found[id], len(parts))
		}
	}
	compareRows(ledger, image.Digests(), &totals, differences)
	checkBalances(image, differences)
	return totals
}

// checkSnapshot checks that a row of a snapshot is the one that the changes before it come to, and takes it where none tells.
func checkSnapshot(image Image, record Record, differences *Differences) {
	if record.Change.Operation != "R" {
		return
	}
	place := RowKey{record.Change.Table, record.Change.Key}
	before, known := image[place]
	if known && digestRow(before) != digestRow(record.Change.After) {
		differences.add("%s (%s): the snapshot's row %s is not what the changes before it come to", record.Place, record.Coordinate, place)
	}
	if place.Key != "" {
		image[place] = record.Change.After
	}
}

// checkLanes checks the order in which each partition or stream holds its records.
func checkLanes(records []Record, differences *Differences) {
	last := map[string]Record{}
	for _, record := range records {
		if before, ok := last[record.Lane]; ok {
			if record.Coordinate.Compare(before.Coordinate) <= 0 {
				differences.add("out of order: %s at %s follows %s", record.Coordinate, record.Place, before.Coordinate)
			}
			if record.Millis < before.Millis {
				differences.add("%s: the timestamp goes back from %d to %d", record.Place, before.Millis, record.Millis)
			}
		}
		last[record.Lane] = record
	}
}

// commit is a transaction's place in the log.
type commit struct {
	epoch uint32
	lsn   uint64
}

// commits learns where each transaction was committed, and that no two were committed at one place.
type commits struct {
	places       map[uint32]commit
	transactions map[commit]uint32
}

func newCommits() *commits {
	return &commits{map[uint32]commit{}, map[commit]uint32{}}
}

func (c *commits) check(record Record, differences *Differences) {
	place := commit{record.Coordinate.Epoch, record.Coordinate.LSN}
	transaction := record.Change.Transaction
	if before, ok := c.places[transaction]; ok && before != place {
		differences.add("transaction %d is both at %d:%X and at %s", transaction, before.epoch, before.lsn, record.Coordinate)
	}
	if before, ok := c.transactions[place]; ok && before != transaction {
		differences.add("%s belongs to both transaction %d and %d", record.Coordinate, before, transaction)
	}
	c.places[transaction], c.transactions[place] = place, transaction
}

// schemas has the schema that each table has.
type schemas map[Table]schema

type schema struct {
	version uint32
	// since is where the record lies that said so; nothing for the first schema that the table was seen with.
	since Coordinate
}

// check checks that a table's schema is another one exactly where a record says so, and that this comes right before a record.
func (s schemas) check(record Record, differences *Differences) {
	change := record.Change
	known, seen := s[change.Table]
	switch {
	case change.Operation != "S" && !seen:
		s[change.Table] = schema{version: change.SchemaVersion}
	case change.Operation != "S" && change.SchemaVersion != known.version:
		differences.add("%s (%s): the schema is version %d, and was said to be %d", record.Place, record.Coordinate, change.SchemaVersion, known.version)
	case change.Dropped:
		// One that was made anew under its name has begun before.
	case change.Operation == "S":
		if change.SchemaVersion != change.OldSchemaVersion+1 || change.Coordinate.Part != 0 {
			differences.add("%s (%s): version %d of the schema follows version %d", record.Place, record.Coordinate, change.SchemaVersion, change.OldSchemaVersion)
		}
		s[change.Table] = schema{change.SchemaVersion, record.Coordinate}
	}
}

// partOf is which of its change's records this is: another schema that it comes with is part 0.
func (s schemas) partOf(record Record) int {
	before := record.Coordinate
	before.Part = 0
	if s[record.Change.Table].since == before {
		return int(record.Coordinate.Part) - 1
	}
	return int(record.Coordinate.Part)
}

func compareRecord(entry Entry, record Record, number int, row []Column, differences *Differences) {
	change, parts := record.Change, expected(entry)
	if number < 0 || number >= len(parts) {
		differences.add("%s (%s): the change has %d records", record.Place, record.Coordinate, len(parts))
		return
	}
	want := parts[number]
	got := part{change.Operation, change.Key, ""}
	if row != nil {
		got.digest = digestRow(row)
	}
	if change.Table != entry.Table {
		differences.add("%s (%s): of table %s, the ledger says %s", record.Place, record.Coordinate, change.Table, entry.Table)
	}
	if got != want {
		differences.add("%s (%s): %s, the ledger says %s", record.Place, record.Coordinate, got, want)
	}
	if change.KeyChanged != (len(parts) > 1) || change.OldKey != "" && change.OldKey != entry.OldKey {
		differences.add("%s (%s): the change of the key from %q is not as in the ledger, %q", record.Place, record.Coordinate, change.OldKey, entry.OldKey)
	}
}

func (p part) String() string {
	return fmt.Sprintf("%s of %s with digest %q", p.operation, p.key, p.digest)
}

// compareRows compares what the records come to with the rows of the tables.
func compareRows(ledger *Ledger, rebuilt map[RowKey]string, totals *Totals, differences *Differences) {
	keys := ledger.keys()
	rebuilt, rows := only(rebuilt, keys), only(ledger.Rows, keys)
	totals.Keys, totals.Digest = len(rebuilt), digestAll(rebuilt)
	for key := range keys {
		got, isRebuilt := rebuilt[key]
		want, exists := rows[key]
		switch {
		case isRebuilt && !exists:
			differences.add("%s is there by the log, but not in the table", key)
		case !isRebuilt && exists:
			differences.add("%s is in the table, but not by the log", key)
		case got != want:
			differences.add("%s differs: digest %s by the log, %s in the table", key, got, want)
		}
	}
}

// CompareValues checks that two sinks hold the same bytes for the same coordinate. What only one of them holds is a difference
// from the ledger, and found there.
func CompareValues(kafka, redis []Record, differences *Differences) {
	values := make(map[Coordinate][]byte, len(kafka))
	for _, record := range kafka {
		values[record.Coordinate] = record.Value
	}
	for _, record := range redis {
		if value, ok := values[record.Coordinate]; ok && !bytes.Equal(value, record.Value) {
			differences.add("%s (%s): the value is not the one in Kafka", record.Place, record.Coordinate)
		}
	}
}
