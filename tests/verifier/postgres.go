package main

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// settings decide how values look as text; they are those of capture.
var settings = map[string]string{
	"TimeZone":           "UTC",
	"DateStyle":          "ISO",
	"IntervalStyle":      "postgres",
	"extra_float_digits": "3",
	"bytea_output":       "hex",
}

// ReadLedger reads the ledger and the tables that it speaks of, as of one moment.
func ReadLedger(ctx context.Context, url string) (*Ledger, error) {
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	for name, value := range settings {
		config.RuntimeParams[name] = value
	}
	connection, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	defer connection.Close(ctx)
	transaction, err := connection.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return nil, err
	}
	// It is read-only, so its end changes nothing.
	defer func() { _ = transaction.Rollback(ctx) }()

	ledger := &Ledger{Entries: map[EntryID]Entry{}, Rows: map[RowKey]string{}}
	if err := readEntries(ctx, transaction, ledger); err != nil {
		return nil, fmt.Errorf("the ledger: %w", err)
	}
	for _, table := range ledger.Tables() {
		if err := readRows(ctx, transaction, table, ledger.Rows); err != nil {
			return nil, fmt.Errorf("table %s: %w", table, err)
		}
	}
	return ledger, nil
}

func readEntries(ctx context.Context, transaction pgx.Tx, ledger *Ledger) error {
	// Records carry the low 32 bits of the transaction id.
	rows, err := transaction.Query(ctx, `
		SELECT transaction_id & 4294967295, change_index, schema_name, table_name, operation,
			coalesce(key, ''), coalesce(old_key, ''), coalesce(digest, '')
		FROM meander_ledger.entries`)
	if err != nil {
		return err
	}
	var id, index int64
	var entry Entry
	_, err = pgx.ForEachRow(rows, []any{
		&id, &index, &entry.Table.Schema, &entry.Table.Name, &entry.Operation, &entry.Key, &entry.OldKey, &entry.Digest,
	}, func() error {
		ledger.Entries[EntryID{uint32(id), uint64(index)}] = entry
		return nil
	})
	return err
}

func readRows(ctx context.Context, transaction pgx.Tx, table Table, digests map[RowKey]string) error {
	rows, err := transaction.Query(ctx, fmt.Sprintf(
		`SELECT key, digest FROM (
			SELECT meander_ledger.key_of(t) AS key, meander_ledger.digest_of(t) AS digest FROM %s t
		) AS image WHERE key IS NOT NULL`, pgx.Identifier{table.Schema, table.Name}.Sanitize()))
	if err != nil {
		return err
	}
	var key, digest string
	_, err = pgx.ForEachRow(rows, []any{&key, &digest}, func() error {
		digests[RowKey{table, key}] = digest
		return nil
	})
	return err
}
